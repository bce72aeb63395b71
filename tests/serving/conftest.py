from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from served import Server, server, smoke_release, staged

from components.contracts.records import Stored
from components.contracts.releases import Release


@pytest.fixture(scope="session")
def smoke(trained: Path) -> Stored[Release]:
    """The release that the smoke recipe packaged; read it, never change it."""
    return smoke_release(trained)


@pytest.fixture
def stage(tmp_path: Path, smoke: Stored[Release]) -> Path:
    """A workspace with the smoke release routed as generation 1, version 1."""
    return staged(tmp_path, smoke)


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory, smoke: Stored[Release]) -> Iterator[Server]:
    """One server for every test that only asks it."""
    with server(staged(tmp_path_factory.mktemp("running"), smoke), "--max-body-mb", "2") as found:
        yield found
