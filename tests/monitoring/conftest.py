"""The loop's tables, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from components.databases import Database
from monitoring.records import metadata, open_records


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """An empty database of the loop."""
    url = f"sqlite:///{tmp_path / 'loop.db'}" if request.param == "sqlite" else request.getfixturevalue("postgres")
    if request.param == "postgresql":
        engine = sa.create_engine(url)
        metadata.drop_all(engine)
        engine.dispose()
    found = open_records(url)
    yield found
    found.close()
