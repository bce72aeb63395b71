"""Stores of a team, thrown away after the test: an S3 bucket with conditional writes, a database of one's own."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator

import pytest
import sqlalchemy as sa


@contextlib.contextmanager
def s3_bucket(name: str) -> Iterator[str]:
    """Address of an empty bucket; the environment names its server meanwhile."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    own = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    try:
        # These names alone are put back: what else is set meanwhile, such as a server of the whole session, stays.
        with pytest.MonkeyPatch.context() as patched:
            for variable, value in (own | {"AWS_DEFAULT_REGION": "us-east-1"}).items():
                patched.setenv(variable, value)
            boto3.client("s3").create_bucket(Bucket=name)
            yield f"s3://{name}"
    finally:
        server.stop()


def fresh_database(server: str) -> str:
    """URL of a new database on a PostgreSQL server."""
    name, engine = f"test_{uuid.uuid4().hex[:8]}", sa.create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return server.rsplit("/", 1)[0] + f"/{name}"
