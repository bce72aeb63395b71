"""Companions: what a data version knows of its pictures beside their bytes, as text beside `data.dvc` in git.

A companion is a CSV file `data.<name>.csv`: a header, and rows sorted by their first column, which is their key. `data.dvc`
carries the sha256 of each in its `meta`, as it does for the test ledger (`components/dataversions.py`), so none can change
without the version. One without rows has no file, as in versions from before there were companions.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from components.contracts.errors import DataError, SchemaTooNew
from components.contracts.records import canonical_json, sha256_text
from components.store import sha256_file, write_atomically
from components.tables import arrow_reader

if TYPE_CHECKING:
    import pandas as pd


PIN = "data.dvc"
TEST_LEDGER = "data.test-ledger.csv"


@dataclass(frozen=True)
class Companion:
    """One kind of companion: its name and its columns, of which the first one is the key of a row."""

    name: str
    columns: tuple[str, ...]

    @property
    def file(self) -> str:
        """The name of its file beside `data.dvc`."""
        return f"data.{self.name}.csv"

    @property
    def key(self) -> str:
        """The entry of `data.dvc`'s meta that holds the sha256 of its file."""
        return f"visionloop_{self.name}_sha256"

    def read(self, root: Path) -> pd.DataFrame:
        """Its rows in the workspace `root`, every value as text; none where it has no file. Raises DataError."""
        try:
            return self.parse((root / self.file).read_bytes(), place=str(root / self.file))
        except FileNotFoundError:
            return self.frame()
        except OSError as error:
            raise DataError(f"cannot read {root / self.file}: {error.strerror}; mend it and run again") from error

    def frame(self, rows: Mapping[str, tuple[str, ...]] | None = None) -> pd.DataFrame:
        """Rows, each the other columns by its key, as `read` gives them."""
        import pandas as pd

        rows = rows or {}
        others = zip(*rows.values(), strict=True) if rows else ((),) * (len(self.columns) - 1)
        values = dict(zip(self.columns, (tuple(rows), *others), strict=True))
        return pd.DataFrame(values, columns=list(self.columns), dtype="str")

    def parse(self, content: bytes, *, place: str) -> pd.DataFrame:
        """The rows of a file's bytes; `place` names it where it is refused. Raises DataError, SchemaTooNew."""
        import pyarrow as pa
        from pyarrow import csv as arrow

        restore = f"restore it with `git checkout -- {self.file}`"
        head, _, rest = content.partition(b"\n")
        header = head.decode(errors="replace").split(",")
        if header != list(self.columns):
            if header[: len(self.columns)] == list(self.columns):
                raise SchemaTooNew(f"{place} has columns that this visionloop does not know; upgrade visionloop")
            raise DataError(f"{place} begins with {','.join(header)!r}, expected {','.join(self.columns)!r}; {restore}")
        if not rest:
            return self.frame()
        try:
            table = arrow.read_csv(
                arrow_reader(rest),
                arrow.ReadOptions(use_threads=False, column_names=list(self.columns)),
                arrow.ParseOptions(ignore_empty_lines=False),
                arrow.ConvertOptions(column_types=dict.fromkeys(self.columns, pa.string()), strings_can_be_null=False),
            )
        except pa.ArrowInvalid as error:
            raise DataError(f"{place} is no table of {','.join(self.columns)} ({error}); {restore}") from error
        found: pd.DataFrame = table.to_pandas(use_threads=False)
        keys = found[self.columns[0]]
        if (keys == "").any() or keys.duplicated().any():
            problem = f"several rows of {keys[keys.duplicated()].iloc[0]!r}" if (keys != "").all() else "a row without a key"
            raise DataError(f"{place} has {problem}; {restore}")
        return found

    def write(self, root: Path, rows: pd.DataFrame) -> None:
        """Replace its file in one step; without rows it has none. `dataversions.pin` then makes it part of a version."""
        if set(rows.columns) != set(self.columns) or rows[self.columns[0]].duplicated().any():
            raise ValueError(f"expected the columns {self.columns}, each {self.columns[0]} once")
        if len(rows):
            write_atomically(root / self.file, self.text(rows))
        else:
            (root / self.file).unlink(missing_ok=True)

    def text(self, rows: pd.DataFrame) -> bytes:
        """The bytes of its file; raises DataError for a value of several lines, which a row cannot hold."""
        rows = rows.sort_values(self.columns[0])[list(self.columns)]
        for column in self.columns:
            broken = rows[rows[column].str.contains(r"[\r\n]", regex=True)]
            if len(broken):
                raise DataError(
                    f"{column} {broken[column].iloc[0]!r} of {broken[self.columns[0]].iloc[0]} holds a line break; expected "
                    f"one line"
                )
        out = io.StringIO(newline="")
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(zip(*(rows[column] for column in self.columns), strict=True))
        return out.getvalue().encode()


CLUSTERS = Companion("clusters", ("picture", "cluster"))
"""Pictures that are verified near-duplicates of others; a cluster is named after its lowest picture."""
APART = Companion("apart", ("pair", "relation"))
"""Near-duplicates that a person took for pictures of their own, `lower-higher` digest, and how they are alike."""
ATTRIBUTES = Companion("attributes", ("sha256", "group", "captured_at", "source", "label_source", "confidence"))
"""What a source knows of a file's bytes beside its class."""
FURTHER = Companion("columns", ("sha256", "values"))
"""Columns of a manifest that visionloop has no use for but slices: an object of text by the file's bytes."""
REVIEWS = Companion("reviews", ("issue", "decision", "who", "when", "why", "note"))
"""What people decided about issues, which are not asked again."""
FILES = Companion("files", ("file", "picture"))
"""The picture that each file ever seen was, by the first 32 hex digits of the file's sha256."""
COMPANIONS = (CLUSTERS, APART, ATTRIBUTES, FURTHER, REVIEWS, FILES)


def digests(root: Path) -> dict[str, str]:
    """The sha256 of each companion's file that is there, by the companion's name."""
    return {each.name: sha256_file(root / each.file) for each in COMPANIONS if (root / each.file).is_file()}


def digest_of_all(by_name: Mapping[str, str]) -> str:
    """One digest over all companions of a version, "" where it has none."""
    return sha256_text(canonical_json(dict(by_name))) if by_name else ""
