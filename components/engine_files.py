"""What the files of an engine may hold before a runtime opens them: nothing that leads elsewhere, no foreign code.

A runtime believes its files. An ONNX graph may name other files for its weights, and libraries for its operators; the XML of
OpenVINO may be a document with entities, and name extensions. Files of other kinds cannot be looked into.
"""

from __future__ import annotations

import re
import xml.parsers.expat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from components.contracts.errors import EngineUnavailable, TamperedArtefact

_MAX_GRAPH = 2 << 30
"""Bytes of an ONNX file; a protobuf message cannot have more."""
_MAX_XML = 256 << 20
_MAX_DEPTH = 64
"""Of elements in elements; how deep graphs lie in nodes is bounded by protobuf."""
_OPERATORS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
"""Domains of operators that ONNX Runtime has built in."""
_OPSET = re.compile(r"opset[0-9]{1,3}")


def inspect(file: Path, *, is_entry: bool) -> bool:
    """Look into one file; whether its kind can be looked into. Raises TamperedArtefact for what it may not hold.

    The entry is what a runtime opens.
    """
    if file.suffix == ".onnx":
        _inspect_onnx(file)
    elif file.suffix == ".xml":
        _inspect_xml(file)
    else:
        # Plain numbers, whose places the XML tells. A runtime that opens such a file goes by what it holds, a graph or a
        # program, whatever it is called.
        return file.suffix == ".bin" and not is_entry
    return True


def _inspect_onnx(file: Path) -> None:
    try:
        import onnx
    except ImportError as error:
        raise EngineUnavailable(
            f"{file.name} cannot be looked into: onnx is not installed ({error}); run: python -m pip install onnx"
        ) from error
    if file.stat().st_size > _MAX_GRAPH:
        raise TamperedArtefact(f"{file.name} has more than {_MAX_GRAPH} bytes")
    try:
        model = onnx.ModelProto.FromString(file.read_bytes())
    except Exception as error:
        # protobuf's own, which differs between its implementations
        raise TamperedArtefact(f"{file.name} is no ONNX ({type(error).__name__})") from error
    own = {(function.domain, function.name) for function in model.functions}
    training = [graph for info in model.training_info for graph in (info.initialization, info.algorithm)]
    messages = [model.graph, *model.functions, *training]
    while messages:
        message = messages.pop()
        for tensor in getattr(message, "initializer", ()):
            _expect_inside(tensor, file)
        for sparse in getattr(message, "sparse_initializer", ()):
            _expect_inside(sparse.values, file)
            _expect_inside(sparse.indices, file)
        for node in message.node:
            if node.domain not in _OPERATORS and (node.domain, node.op_type) not in own:
                raise TamperedArtefact(
                    f"{file.name} has the operator {node.op_type!r} of {node.domain!r}, for which a runtime would load a "
                    f"library; allowed are {', '.join(domain or 'ONNX' for domain in _OPERATORS)}"
                )
            for attribute in node.attribute:
                for tensor in _tensors(attribute):
                    _expect_inside(tensor, file)
                messages += [graph for graph in (*attribute.graphs, attribute.g) if graph.ByteSize()]


def _tensors(attribute: Any) -> Iterator[Any]:
    yield attribute.t
    yield from attribute.tensors
    for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
        yield sparse.values
        yield sparse.indices


def _expect_inside(tensor: Any, file: Path) -> None:
    if tensor.external_data or tensor.data_location:
        places = [entry.value for entry in tensor.external_data if entry.key == "location"]
        raise TamperedArtefact(
            f"{file.name} keeps {tensor.name!r} in another file ({', '.join(places) or 'unnamed'}); an engine's graph holds "
            f"its weights itself"
        )


def _inspect_xml(file: Path) -> None:
    weights = file.with_suffix(".bin")
    num_weights = weights.stat().st_size if weights.is_file() else 0
    if file.stat().st_size > _MAX_XML:
        raise TamperedArtefact(f"{file.name} has more than {_MAX_XML} bytes")
    parser = xml.parsers.expat.ParserCreate("utf-8")
    depth = 0

    def refuse(what: str) -> None:
        raise TamperedArtefact(f"{file.name} has {what}; OpenVINO writes none")

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > _MAX_DEPTH:
            refuse(f"elements more than {_MAX_DEPTH} deep")
        if name == "layer" and not _OPSET.fullmatch(attributes.get("version", "")):
            refuse(f"a layer of the extension {attributes.get('version', '')!r}")
        if name == "data" and "offset" in attributes and "size" in attributes:
            try:
                first, size = int(attributes["offset"]), int(attributes["size"])
            except ValueError:
                first, size = -1, 0
            if first < 0 or size < 0 or first + size > num_weights:
                refuse(f"a constant that lies outside of {weights.name}")

    def end(_: str) -> None:
        nonlocal depth
        depth -= 1

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.StartDoctypeDeclHandler = lambda *_: refuse("a document type")
    parser.EntityDeclHandler = lambda *_: refuse("an entity")
    parser.ProcessingInstructionHandler = lambda *_: refuse("an instruction for other programs")
    try:
        with file.open("rb") as stream:
            parser.ParseFile(stream)
    except xml.parsers.expat.ExpatError as error:
        raise TamperedArtefact(f"{file.name} is no XML ({error})") from error
