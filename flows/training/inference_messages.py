"""The messages of the Open Inference Protocol over gRPC that a client asks with, in a pool of their own.

A process can register a protocol's names once, and other clients of the protocol, such as Triton's, do so as well: whoever
came second would fail to import. Only the fields that are asked with and read are here; a reader skips the others.
"""

from __future__ import annotations

from typing import Any

METHOD = "/inference.GRPCInferenceService/ModelInfer"
_MESSAGES: dict[str, tuple[tuple[str, int, str, bool], ...]] = {
    "Tensor": (("name", 1, "string", False), ("datatype", 2, "string", False), ("shape", 3, "int64", True)),
    "Request": (("model_name", 1, "string", False), ("inputs", 5, "Tensor", True), ("raw_input_contents", 7, "bytes", True)),
    "Response": (("outputs", 5, "Tensor", True), ("raw_output_contents", 6, "bytes", True)),
}
"""By message its fields: name, number, type and whether there are several."""


def messages() -> dict[str, Any]:
    """The classes Tensor, Request and Response by name."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="asked.proto", package="asked", syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, number, kind, several in fields:
            label = kinds.LABEL_REPEATED if several else kinds.LABEL_OPTIONAL
            if kind in _MESSAGES:
                message.field.add(
                    name=field, number=number, label=label, type=kinds.TYPE_MESSAGE, type_name=f".asked.{kind}"
                )
            else:
                of = getattr(kinds, f"TYPE_{kind.upper()}")
                message.field.add(name=field, number=number, label=label, type=of)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"asked.{name}")) for name in _MESSAGES}
