"""What a record is: frozen, versioned, with one digest a value; and how it stands in a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
)

from components.contracts.errors import SchemaTooNew, StoreError


def canonical_json(value: object) -> str:
    """JSON with one spelling per value: sorted keys, no spaces, NaN refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Record(BaseModel):
    """A frozen, versioned fact: small, JSON, without absolute paths or live objects.

    Unknown keys are refused. `schema_version` is written with every record; `read` upgrades older ones
    through `UPGRADES` and refuses newer ones with `SchemaTooNew`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    UPGRADES: ClassVar[Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]]] = {}

    schema_version: int = 1
    """A subclass whose fields change raises its default and adds an entry to UPGRADES."""

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Self:
        """Build the record from JSON data of this or an older schema version."""
        values = dict(data)
        newest: int = cls.model_fields["schema_version"].default
        version = values.get("schema_version")
        if not isinstance(version, int) or version < 1:
            raise StoreError(f"{cls.__name__} without a schema_version; expected 1 to {newest}")
        if version > newest:
            raise SchemaTooNew(
                f"{cls.__name__} has schema version {version}, this visionloop reads up to {newest}; upgrade visionloop"
            )
        while version < newest:
            values = cls.UPGRADES[version](values)
            version += 1
            values["schema_version"] = version
        try:
            return cls.model_validate_json(json.dumps(values), strict=True)
        except ValidationError as error:
            raise StoreError(f"not a valid {cls.__name__}: {first_problem(error)}") from error

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = self.model_dump(mode="json")
        return data

    def digest(self) -> str:
        """sha256 of the record's canonical JSON: equal records, equal digests, on any machine."""
        return sha256_text(canonical_json(self.to_json()))


RecordT = TypeVar("RecordT", bound=Record)
RecordCo = TypeVar("RecordCo", bound=Record, covariant=True)


def first_problem(error: ValidationError) -> str:
    """The first complaint of a pydantic error as `place: what is wrong`."""
    problem = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in problem["loc"])
    return f"{place}: {plain(problem)}" if place else plain(problem)


def plain(problem: Mapping[str, Any]) -> str:
    """The message of a pydantic problem without the prefix that tells which exception it came from."""
    return str(problem["msg"]).removeprefix("Value error, ").replace("Tuple should", "The list should")


@dataclass(frozen=True)
class Stored(Generic[RecordCo]):
    """A record together with the verified folder that holds its files."""

    record: RecordCo
    folder: Path


class FileDigest(Record):
    """One file of an artefact: name relative to the artefact's folder, sha256 and size in bytes."""

    name: str
    sha256: str
    bytes: int
