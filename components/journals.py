"""The file format of a journal of predictions."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

SUFFIX = ".journal"
MAGIC = b"VLJ2"
OLDER_MAGIC = b"VLJ1"
BLOCK = 4096
"""Of a disk: a write that is cut short spoils no more than the block that it was for."""
HEAD_BYTES = 3 * BLOCK
_FRAME = struct.Struct("<II")
_JSON = struct.Struct("<I")
_COUNT = struct.Struct("<QQdd96s")
_CHECKSUM = struct.Struct("<I")
MAX_ROW = 16 << 20


@dataclass(frozen=True, slots=True)
class Losses:
    """The rows that a journal should hold and does not."""

    count: int = 0
    since: float = 0.0
    until: float = 0.0
    reason: str = ""
    updates: int = 0
    """How often the count was written: of the two that are in a head the later one counts."""
    cut_short: bool = False
    """Whether one of the two is damaged: at least one more row is missing than could be counted."""

    def plus(self, count: int, *, since: float, until: float, reason: str) -> Losses:
        """With more of them."""
        return Losses(self.count + count, self.since or since, until, reason, self.updates + 1)

    def encoded(self) -> bytes:
        """One of the two counts of a head."""
        data = _COUNT.pack(self.updates, self.count, self.since, self.until, self.reason.encode()[:96])
        return data + _CHECKSUM.pack(zlib.crc32(data))

    @property
    def place(self) -> int:
        """Where in the file it belongs."""
        return BLOCK * (1 + self.updates % 2)

    def gaps(self) -> list[dict[str, Any]]:
        """As the log tells of what is missing; nothing where nothing is."""
        found: list[dict[str, Any]] = []
        if self.count:
            found.append({"gap": self.count, "since": self.since, "until": self.until, "reason": self.reason})
        if self.cut_short:
            found.append({"gap": 1, "since": 0.0, "until": 0.0, "reason": "the count of what was lost is damaged"})
        return found


def empty_head() -> bytes:
    """The beginning of a journal that holds nothing and has lost nothing."""
    first = Losses()
    blocks = (MAGIC, first.encoded(), replace(first, updates=1).encoded())
    return b"".join(block.ljust(BLOCK, b"\0") for block in blocks)


def _losses_in(head: bytes) -> Losses:
    found = []
    for place in (BLOCK, 2 * BLOCK):
        data = head[place : place + _COUNT.size + _CHECKSUM.size]
        if len(data) == _COUNT.size + _CHECKSUM.size and data[_COUNT.size :] == _CHECKSUM.pack(
            zlib.crc32(data[: _COUNT.size])
        ):
            updates, count, since, until, reason = _COUNT.unpack_from(data)
            text = reason.rstrip(b"\0").decode(errors="replace")
            found.append(Losses(count, since, until, text, updates))
    latest = max(found, key=lambda losses: losses.updates, default=Losses())
    return replace(latest, cut_short=len(found) < 2)


def read_losses(path: Path) -> Losses:
    """What the head of a journal says is missing, also while it is written; nothing in one of an older server."""
    for _ in range(5):
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        if not head.startswith(MAGIC):
            return Losses()
        found = _losses_in(head)
        if not found.cut_short:
            break  # else its owner may just have been writing it
    return found


def holds_something(path: Path) -> bool:
    """Whether there is a row in a journal, or one missing from it."""
    try:
        return path.stat().st_size != HEAD_BYTES or bool(read_losses(path).gaps())
    except FileNotFoundError:
        return False  # sealed a moment ago


def encode_row(facts: Mapping[str, Any], *arrays: bytes) -> bytes:
    """One prediction: JSON, then the raw arrays that its `arrays` lengths describe."""
    text = orjson.dumps({**facts, "arrays": [len(array) for array in arrays]})
    payload = b"".join((_JSON.pack(len(text)), text, *arrays))
    return _FRAME.pack(len(payload), zlib.crc32(payload)) + payload


def read_rows(path: Path) -> Iterator[tuple[dict[str, Any], list[bytes]]]:
    """Rows of a journal, and gaps: what its head says was lost, and damaged stretches; a torn end is the end.

    Raises ValueError for a file that is no journal.
    """
    data = path.read_bytes()
    if data.startswith(MAGIC):
        yield from ((gap, []) for gap in read_losses(path).gaps())
    elif not data.startswith(OLDER_MAGIC):
        if len(data) < len(OLDER_MAGIC) or not data.strip(b"\0"):
            return
        raise ValueError(f"{path.name} is not a journal")
    for place, payload in _frames(data):
        if payload is None:
            yield {"gap": 1, "since": 0.0, "until": 0.0, "reason": f"damaged at byte {place}"}, []
            continue
        (size,) = _JSON.unpack_from(payload)
        facts = orjson.loads(payload[_JSON.size : _JSON.size + size])
        start, arrays = _JSON.size + size, []
        for array in facts.pop("arrays"):
            arrays.append(payload[start : start + array])
            start += array
        yield facts, arrays


def _frames(data: bytes) -> Iterator[tuple[int, bytes | None]]:
    """Where each frame begins, and its payload; None for a damaged stretch with frames behind it."""
    place = HEAD_BYTES if data.startswith(MAGIC) else len(OLDER_MAGIC)
    while place < len(data):
        payload = _payload_at(data, place)
        begin = place
        if payload is None:
            following = _next_frame(data, place + 1)
            if following is None:
                return  # the torn end of a process that was killed: it was never answered
            place = following
        else:
            place += _FRAME.size + len(payload)
        yield begin, payload


def _payload_at(data: bytes, place: int) -> bytes | None:
    """The payload of the frame that begins here, None when there is no whole and undamaged one."""
    if place + _FRAME.size + _JSON.size > len(data):
        return None
    length, checksum = _FRAME.unpack_from(data, place)
    start = place + _FRAME.size
    # Cheap tests first: this is also asked of every byte behind a damaged frame.
    if not _JSON.size < length <= MAX_ROW or start + length > len(data) or data[start + _JSON.size : start + 5] != b"{":
        return None
    payload = data[start : start + length]
    return payload if zlib.crc32(payload) == checksum else None


def _next_frame(data: bytes, place: int) -> int | None:
    """Where the next whole frame begins: every frame holds JSON, so it is enough to look at what precedes a brace."""
    brace = place + _FRAME.size + _JSON.size
    while (brace := data.find(b"{", brace)) >= 0:
        start = brace - _FRAME.size - _JSON.size
        if _payload_at(data, start) is not None:
            return start
        brace += 1
    return None
