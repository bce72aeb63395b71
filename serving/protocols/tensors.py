"""Tensors of the Open Inference Protocol: what a model takes and gives, checked before anything is queued.

Input `images`: UINT8 pixels (n, height, width, channels) as the engine takes them, or BYTES (n): encoded pictures, so that
no client repeats the preprocessing. Outputs: label, unsure, confidence, what the model's task adds (of classes their
probabilities), embedding, prediction_id.
"""

from __future__ import annotations

import functools
import itertools
import math
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from components.answering import unsure_label
from components.contracts.families import OutputField
from components.contracts.releases import Release
from components.contracts.wording import counted
from serving.engines.deployment import Deployment
from serving.engines.frames import Form
from serving.inference import Answered, Rejected

INPUT = "images"
MAX_PICTURES = 64
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class Given:
    """One input tensor as it came."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes | Sequence[Any]
    """Raw bytes, or the flat or nested values of a JSON or typed field."""


def pictures(release: Release, inputs: Sequence[Given]) -> list[tuple[Form, bytes]]:
    """The pictures of a request; raises Rejected for a wrong name, datatype, shape or content."""
    if len(inputs) != 1 or inputs[0].name != INPUT:
        names = ", ".join(repr(given.name[:64]) for given in inputs) or "none"
        raise Rejected(400, f"expected exactly one input, {INPUT!r}; got {names}")
    given = inputs[0]
    size = release.engine.preprocessing
    wanted = (size.height, size.width, size.channels)
    if given.datatype == "BYTES":
        if len(given.shape) not in (1, 2) or (len(given.shape) == 2 and given.shape[1] != 1):
            raise Rejected(400, f"shape {_shown(given.shape)} of BYTES; expected [n] or [n, 1] encoded pictures")
        count = _count(given.shape)
        data = _split_bytes(given.data) if isinstance(given.data, bytes) else given.data
        if len(data) != count:
            raise Rejected(400, f"shape {_shown(given.shape)} says {counted(count, 'picture')}, the data hold {len(data)}")
        return [(Form.ENCODED, picture) for picture in _encoded(data)]
    if given.datatype != "UINT8":
        raise Rejected(400, f"datatype {given.datatype[:16]!r}; expected UINT8 pixels or BYTES of encoded pictures")
    if len(given.shape) != 4 or given.shape[1:] != wanted:
        raise Rejected(400, f"shape {_shown(given.shape)}; expected [n, {wanted[0]}, {wanted[1]}, {wanted[2]}] of UINT8")
    count = _count(given.shape)
    one = math.prod(wanted)
    raw = given.data if isinstance(given.data, bytes) else _pixels(given.data, count * one)
    if len(raw) != count * one:
        raise Rejected(400, f"{counted(len(raw), 'byte')} of data; shape {_shown(given.shape)} needs {count * one}")
    return [(Form.PIXELS, raw[start : start + one]) for start in range(0, len(raw), one)]


def _count(shape: tuple[int, ...]) -> int:
    if not 1 <= shape[0] <= MAX_PICTURES:
        raise Rejected(400, f"{counted(shape[0], 'picture')} in one request; accepted are 1 to {MAX_PICTURES}")
    return shape[0]


def _shown(shape: Sequence[int]) -> str:
    return str(list(shape[:8]))


def _split_bytes(data: bytes) -> list[bytes]:
    found, place = [], 0
    while place < len(data):
        if place + _LENGTH.size > len(data):
            raise Rejected(
                400, "BYTES data end within a length; each element is a 4-byte little-endian length and its bytes"
            )
        (length,) = _LENGTH.unpack_from(data, place)
        place += _LENGTH.size
        if place + length > len(data):
            raise Rejected(400, "BYTES data end within an element; each is a 4-byte little-endian length and its bytes")
        found.append(data[place : place + length])
        place += length
        if len(found) > MAX_PICTURES:
            raise Rejected(400, f"more than {MAX_PICTURES} pictures in one request")
    return found


def _encoded(values: Sequence[Any]) -> list[bytes]:
    if not all(isinstance(value, bytes) for value in values):
        raise Rejected(400, "encoded pictures cannot be JSON text; send them as binary data")
    return list(values)


def _pixels(values: Sequence[Any], expected: int) -> bytes:
    flat = values
    for _ in range(4):
        kinds = set(map(type, flat))
        if kinds != {list}:
            break
        if sum(map(len, flat)) > expected:
            raise Rejected(400, f"more values than the shape needs ({expected})")
        flat = list(itertools.chain.from_iterable(flat))
    else:
        kinds = set(map(type, flat))
    # Before numpy sees them: it would make an array of text as wide as the longest of them.
    if kinds != {int}:
        raise Rejected(400, "the data are not a regular list of whole numbers; UINT8 pixels are 0 to 255")
    if len(flat) != expected:
        raise Rejected(400, f"{counted(len(flat), 'value')}; the shape needs {expected}")
    if min(flat) < 0 or max(flat) > 255:
        raise Rejected(400, "a value is outside 0 to 255")
    return bytes(flat)


_REFUSED = {
    "classification": "no classification strings are made; ask for the outputs label and probabilities",
    "shared_memory_": "shared memory is not supported; send and receive the data within the messages",
    "sequence_": "there are no sequences; every picture is answered by itself",
    "priority": "there are no priorities; requests are answered in their order",
    "timeout": "a request has no timeout of its own; set a deadline in the client",
}
"""What the protocol's extensions know and this server does not do, by the beginning of the parameter's name."""
_KINDS = {bool: "true or false", int: "a whole number"}


def check_parameters(place: str, given: Any, known: Mapping[str, type]) -> None:
    """Raise Rejected for a parameter that would have no effect: nothing that a client asks for is dropped in silence.

    A zero, false or empty value of what is not done here asks for nothing and passes.
    """
    if not isinstance(given, Mapping):
        raise Rejected(400, f"parameters of {place} are an object")
    for name, value in given.items():
        if name in known:
            if type(value) is not known[name]:
                raise Rejected(400, f"{name} of {place} is {_KINDS[known[name]]}")
            continue
        why = next((why for start, why in _REFUSED.items() if name.startswith(start)), None)
        if why is None and name != "triton_enable_empty_final_response":  # of a stream, and here is none
            valid = ", ".join(known) or "none"
            raise Rejected(400, f"unknown parameter {name[:64]!r} of {place}; valid: {valid}")
        if why is not None and value not in (0, ""):
            raise Rejected(400, f"{name[:64]} of {place}: {why}")


Values = npt.NDArray[Any] | list[bytes]
_TYPES = {"BOOL": "|b1", "FP32": "<f4", "INT64": "<i8"}


def values_of(field: OutputField, probabilities: npt.NDArray[np.float32]) -> Values:
    """An output of a task for n answers, numbers in the type that they are sent in."""
    values = field.values(probabilities)
    return values if isinstance(values, list) else np.ascontiguousarray(values, dtype=_TYPES[field.datatype])


@dataclass(frozen=True)
class _Described:
    """One output of a model: its type, its shape for one picture, and its values in an answer."""

    datatype: str
    shape: tuple[int, ...]
    values: Callable[[Answered], Values]


def _outputs_of(deployment: Deployment) -> dict[str, _Described]:
    """The outputs of a model by name, in their order."""
    return {
        "label": _Described("BYTES", (), lambda a: [x.label.encode() for x in a.answers]),
        "unsure": _Described("BOOL", (), lambda a: np.array([x.unsure for x in a.answers], dtype=np.bool_)),
        "confidence": _Described("FP32", (), lambda a: np.array([x.confidence for x in a.answers], dtype=np.float32)),
        **{
            field.name: _Described(field.datatype, field.shape, functools.partial(_of_task, field))
            for field in deployment.task_outputs
        },
        "embedding": _Described(
            "FP32",
            (deployment.release.engine.embedding_dim,),
            lambda a: np.stack([np.frombuffer(x.facts.embedding, dtype="<f2").astype(np.float32) for x in a.answers]),
        ),
        "prediction_id": _Described("BYTES", (), lambda a: [x.prediction_id.encode() for x in a.answers]),
    }


def _of_task(field: OutputField, answered: Answered) -> Values:
    return values_of(field, np.stack([answer.facts.probabilities for answer in answered.answers]))


EXTENSIONS = ("binary_tensor_data", "model_configuration")
_CONFIGURED = {
    "UINT8": "TYPE_UINT8",
    "BYTES": "TYPE_STRING",
    "BOOL": "TYPE_BOOL",
    "FP32": "TYPE_FP32",
    "INT64": "TYPE_INT64",
}


def configuration(deployment: Deployment) -> dict[str, Any]:
    """The model's configuration as the protocol's extension has it: shapes are those of one picture."""
    told = metadata(deployment)

    def described(tensor: Mapping[str, Any]) -> dict[str, Any]:
        return {"name": tensor["name"], "data_type": _CONFIGURED[tensor["datatype"]], "dims": tensor["shape"][1:]}

    return {
        "name": told["name"],
        "platform": told["platform"],
        "backend": "visionloop",
        "max_batch_size": MAX_PICTURES,
        "input": [described(tensor) for tensor in told["inputs"]],
        "output": [described(tensor) for tensor in told["outputs"]],
        # Pictures of different requests share a batch.
        "dynamic_batching": {},
    }


def metadata(deployment: Deployment) -> dict[str, Any]:
    """The model's metadata as the protocol has it."""
    release = deployment.release
    size = release.engine.preprocessing
    return {
        "name": release.model,
        "versions": [deployment.version],
        "platform": f"{release.engine.target}_{release.engine.precision}",
        "inputs": [{"name": INPUT, "datatype": "UINT8", "shape": [-1, size.height, size.width, size.channels]}],
        "outputs": [
            {"name": name, "datatype": output.datatype, "shape": [-1, *output.shape]}
            for name, output in _outputs_of(deployment).items()
        ],
        "parameters": {
            "encoded_input": f"{INPUT} may also be BYTES [n]: whole files, such as JPEG or PNG",
            "classes": list(release.engine.classes),
            "threshold": release.decision.threshold,
            **({"class_thresholds": release.decision.class_thresholds} if release.decision.critical else {}),
            "label_when_unsure": unsure_label(release.engine.classes),
            "release": release.digest(),
        },
    }


@dataclass(frozen=True)
class Output:
    """One output tensor of a response."""

    name: str
    datatype: str
    shape: list[int]
    values: Values

    @property
    def raw(self) -> bytes:
        """Row-major little-endian bytes; BYTES elements with their lengths."""
        if isinstance(self.values, list):
            return b"".join(_LENGTH.pack(len(value)) + value for value in self.values)
        return self.values.tobytes()

    @property
    def listed(self) -> list[Any]:
        """Flat JSON values."""
        if isinstance(self.values, list):
            return [value.decode() for value in self.values]
        flat: list[Any] = self.values.ravel().tolist()
        return flat


def outputs(answered: Answered, wanted: Sequence[str]) -> list[Output]:
    """The outputs asked for, all of them when none is named."""
    found = []
    known = _outputs_of(answered.deployment)
    # What was checked may have been another release: an answer can be an older one's, by its idempotency key.
    _expect(wanted, known)
    for name in wanted or known:
        made = known[name].values(answered)
        shape = [len(made)] if isinstance(made, list) else list(made.shape)
        found.append(Output(name, known[name].datatype, shape, made))
    return found


def check_outputs(deployment: Deployment, wanted: Sequence[str]) -> None:
    """Raise Rejected for an output that the model does not have, or that is asked for twice."""
    if len(set(wanted)) < len(wanted):
        raise Rejected(400, "an output is asked for twice")
    _expect(wanted, _outputs_of(deployment))


def _expect(wanted: Sequence[str], known: Collection[str]) -> None:
    for name in wanted:
        if name not in known:
            raise Rejected(400, f"unknown output {name[:64]!r}; valid: {', '.join(known)}")


@dataclass(frozen=True)
class RestRequest:
    """A v2 inference request over REST."""

    id: str
    inputs: tuple[Given, ...]
    outputs: tuple[tuple[str, bool], ...]
    """Names, and whether they are wanted as binary data."""
    binary_default: bool


def read_rest(body: bytes, header_length: str | None, *, model: str, version: str) -> RestRequest:
    """Parse a request body, with its binary part behind the JSON where the header says how long that is.

    Raises Rejected for all that is not understood, also for a `model` or `version` other than what the address names.
    """
    try:
        length = len(body) if header_length is None else int(header_length)
    except ValueError:
        raise Rejected(400, "Inference-Header-Content-Length is not a number") from None
    if not 0 <= length <= len(body):
        raise Rejected(400, "Inference-Header-Content-Length is longer than the body")
    try:
        told = orjson.loads(body[:length])
    except orjson.JSONDecodeError:
        raise Rejected(400, "the body is not JSON (numbers have to be finite)") from None
    binary, place = body[length:], 0
    try:
        given = []
        for tensor in told["inputs"]:
            name, datatype, shape = tensor["name"], tensor["datatype"], tensor["shape"]
            if not (isinstance(name, str) and isinstance(datatype, str)):
                raise Rejected(400, "name and datatype of an input are text")
            if not (isinstance(shape, list) and all(type(n) is int and 0 <= n < 1 << 31 for n in shape)):
                raise Rejected(400, "the shape of an input is a list of whole numbers, none negative")
            _check_keys(f"input {name[:64]!r}", tensor, ("name", "datatype", "shape", "parameters", "data"))
            parameters = _parameters(f"input {name[:64]!r}", tensor, binary_data_size=int)
            size = parameters.get("binary_data_size")
            data: bytes | list[Any]
            if size is None:
                data = tensor["data"]
                if not isinstance(data, list):
                    raise Rejected(400, "data of an input is a list")
            else:
                if "data" in tensor:
                    raise Rejected(400, "an input has data or binary_data_size, not both")
                if not 0 <= size <= len(binary) - place:
                    raise Rejected(400, "binary_data_size says more than the body holds")
                data = binary[place : place + size]
                place += size
            given.append(Given(name, datatype, tuple(shape), data))
        default = _parameters("the request", told, binary_data_output=bool).get("binary_data_output", False)
        wanted = []
        outputs_asked = told.get("outputs")
        if not isinstance(outputs_asked, list | None):
            raise Rejected(400, "outputs is a list")
        for output in outputs_asked or []:
            name = str(output["name"])
            _check_keys(f"output {name[:64]!r}", output, ("name", "parameters"))
            wanted.append((name, _parameters(f"output {name[:64]!r}", output, binary_data=bool).get("binary_data", default)))
        identifier = told.get("id")
        for key, served in (("model_name", model), ("model_version", version)):
            if (asked := told.get(key)) not in (None, "", served):
                raise Rejected(400, f"{key} of the body is {str(asked)[:64]!r}; this address answers for {served!r}")
        _check_keys("the request", told, ("id", "model_name", "model_version", "parameters", "inputs", "outputs"))
    except (KeyError, TypeError, AttributeError):
        raise Rejected(400, "not a v2 inference request: inputs need name, datatype, shape and data") from None
    if place != len(binary):
        raise Rejected(400, "the body holds more binary data than its inputs say")
    if identifier is not None and (not isinstance(identifier, str) or len(identifier) > 128):
        raise Rejected(400, "the id is text of at most 128 characters")
    return RestRequest(identifier or "", tuple(given), tuple(wanted), default)


def _parameters(place: str, told: Mapping[str, Any], **known: type) -> Mapping[str, Any]:
    given = told.get("parameters")
    given = {} if given is None else given
    check_parameters(place, given, known)
    return given


def _check_keys(place: str, told: Mapping[str, Any], valid: Sequence[str]) -> None:
    for key in told:
        if key not in valid:
            raise Rejected(400, f"unknown field {key[:64]!r} of {place}; valid: {', '.join(valid)}")


def write_rest(request: RestRequest, answered: Answered) -> tuple[bytes, int | None]:
    """The response body, and the length of its JSON part when binary data follow it."""
    found = outputs(answered, [name for name, _ in request.outputs])
    binary = dict(request.outputs)
    listed: list[Mapping[str, Any]] = []
    raw: list[bytes] = []
    for output in found:
        described: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": output.shape}
        if binary.get(output.name, request.binary_default):
            raw.append(output.raw)
            described["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            described["data"] = output.listed
        listed.append(described)
    told: dict[str, Any] = {
        "model_name": answered.deployment.model,
        "model_version": answered.version,
        "outputs": listed,
    }
    if request.id:
        told["id"] = request.id
    text = orjson.dumps(told)
    return b"".join((text, *raw)), len(text) if raw else None
