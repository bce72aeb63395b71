"""What the server and the engine's process say to each other: length-prefixed frames over a socket pair.

    u32 length | u8 kind | payload

A batch is `u32 id, u16 n` and per picture `u8 form, u32 length, bytes`; its answer `u32 id, u16 n, f32 decode_ms, f32
infer_ms` and per picture either a refusal or fixed-width facts with float32 probabilities and a float16 embedding.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

MAX_FRAME = 1 << 30
_HEAD = struct.Struct("<IB")
_BATCH = struct.Struct("<IH")
_PICTURE = struct.Struct("<BI")
_ANSWER = struct.Struct("<IHff")
_STATUS = struct.Struct("<B")
_REFUSAL = struct.Struct("<H")
_FACTS = struct.Struct("<32sIII4f?")


class Kind(IntEnum):
    """Kinds of frames."""

    LOAD = 1
    READY = 2
    FAILED = 3
    BATCH = 4
    ANSWER = 5


class Form(IntEnum):
    """What a picture's bytes are."""

    ENCODED = 0
    PIXELS = 1


class Outcome(IntEnum):
    """What came of a picture."""

    ANSWERED = 0
    UNDECODABLE = 1
    FAILED = 2


@dataclass(frozen=True, slots=True)
class Facts:
    """One answered picture: what it is, and what the engine says about it."""

    image_sha256: str
    width: int
    height: int
    num_bytes: int
    appearance: tuple[float, float, float, float]
    probabilities: npt.NDArray[np.float32]
    embedding: bytes
    """float16, little-endian."""
    profile_ignored: bool = False
    """Its colour profile is broken or does not fit; its colours were taken as they are stored."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """One picture that got no answer, and why."""

    outcome: Outcome
    message: str


def frame(kind: Kind, payload: bytes) -> bytes:
    return _HEAD.pack(len(payload), kind) + payload


def encode_batch(batch_id: int, pictures: Sequence[tuple[Form, bytes]]) -> bytes:
    parts = [_BATCH.pack(batch_id, len(pictures))]
    for form, data in pictures:
        parts += [_PICTURE.pack(form, len(data)), data]
    return frame(Kind.BATCH, b"".join(parts))


def decode_batch(payload: bytes) -> tuple[int, list[tuple[Form, bytes]]]:
    batch_id, count = _BATCH.unpack_from(payload)
    place, found = _BATCH.size, []
    for _ in range(count):
        form, length = _PICTURE.unpack_from(payload, place)
        place += _PICTURE.size
        found.append((Form(form), payload[place : place + length]))
        place += length
    return batch_id, found


def encode_answer(batch_id: int, results: Sequence[Facts | Refusal], *, decode_ms: float, infer_ms: float) -> bytes:
    parts = [_ANSWER.pack(batch_id, len(results), decode_ms, infer_ms)]
    for result in results:
        if isinstance(result, Refusal):
            message = result.message.encode()[:500]
            parts += [_STATUS.pack(result.outcome), _REFUSAL.pack(len(message)), message]
        else:
            parts += [
                _STATUS.pack(Outcome.ANSWERED),
                _FACTS.pack(
                    bytes.fromhex(result.image_sha256),
                    result.width,
                    result.height,
                    result.num_bytes,
                    *result.appearance,
                    result.profile_ignored,
                ),
                result.probabilities.astype("<f4").tobytes(),
                result.embedding,
            ]
    return frame(Kind.ANSWER, b"".join(parts))


def decode_answer(payload: bytes, *, width: int, embedding_dim: int) -> tuple[int, list[Facts | Refusal], float, float]:
    """`width` is how many probabilities an answer has."""
    batch_id, count, decode_ms, infer_ms = _ANSWER.unpack_from(payload)
    place = _ANSWER.size
    found: list[Facts | Refusal] = []
    for _ in range(count):
        outcome = Outcome(payload[place])
        place += _STATUS.size
        if outcome is not Outcome.ANSWERED:
            (length,) = _REFUSAL.unpack_from(payload, place)
            place += _REFUSAL.size
            found.append(Refusal(outcome, payload[place : place + length].decode(errors="replace")))
            place += length
            continue
        digest, columns, rows, num_bytes, *looks, ignored = _FACTS.unpack_from(payload, place)
        place += _FACTS.size
        probabilities = np.frombuffer(payload, dtype="<f4", count=width, offset=place)
        place += 4 * width
        embedding = payload[place : place + 2 * embedding_dim]
        place += 2 * embedding_dim
        brightness, contrast, sharpness, saturation = looks
        shown = (brightness, contrast, sharpness, saturation)
        found.append(Facts(digest.hex(), columns, rows, num_bytes, shown, probabilities, embedding, ignored))
    return batch_id, found, decode_ms, infer_ms


class Splitter:
    """Bytes as they arrive to whole frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[Kind, bytes]]:
        """Frames that are complete now; raises ValueError for one that cannot be ours."""
        self._buffer += data
        while len(self._buffer) >= _HEAD.size:
            length, kind = _HEAD.unpack_from(self._buffer)
            if length > MAX_FRAME:
                raise ValueError("a frame longer than any of ours")
            if len(self._buffer) < _HEAD.size + length:
                return
            payload = bytes(self._buffer[_HEAD.size : _HEAD.size + length])
            del self._buffer[: _HEAD.size + length]
            yield Kind(kind), payload
