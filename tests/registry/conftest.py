"""Both databases that the registry's tables live in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa


@pytest.fixture(params=["sqlite", "postgresql"])
def fresh(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., str]:
    """The URL of a database without the tables that are named."""

    def url(*tables: str) -> str:
        if request.param == "sqlite":
            return f"sqlite:///{tmp_path / 'ledger.db'}"
        found: str = request.getfixturevalue("postgres")
        with sa.create_engine(found).begin() as connection:
            for table in tables:
                connection.execute(sa.text(f"DROP TABLE IF EXISTS {table}"))
        return found

    return url
