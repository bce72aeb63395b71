"""The Open Inference Protocol over gRPC: the same answers, refusals and bounds as over HTTP."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from components.contracts import Release
from serving import open_inference_pb2 as pb
from serving import tensors
from serving.app import Access, Room, model_ready
from serving.auth import Role
from serving.frames import Form
from serving.inference import Inference, Rejected
from serving.metrics import log

SERVICE = "inference.GRPCInferenceService"
_LARGE = 1 << 20
_UNPACKED = 8
_NUMBERS = ("int_contents", "int64_contents", "uint_contents", "uint64_contents")
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    422: grpc.StatusCode.INVALID_ARGUMENT,
}
_NEEDS: dict[str, Role | None] = {
    "ServerLive": None,
    "ServerReady": None,
    "ModelReady": None,
    "ServerMetadata": "viewer",
    "ModelMetadata": "viewer",
    "ModelInfer": "predictor",
}


@dataclass(frozen=True)
class _Caller:
    name: str
    key: str
    size: int = 0
    """Bytes of the message, of one that infers."""


class Grpc:
    """The service's methods."""

    def __init__(
        self,
        inference: Inference,
        access: Access,
        *,
        request_timeout_s: float,
        max_body: int,
        max_bytes: int = 512 << 20,
    ) -> None:
        self._inference, self._access, self._request_timeout_s = inference, access, request_timeout_s
        # Room for several at any limit: one that comes slowly does not keep out all others.
        self._room = Room(max(max_bytes, _UNPACKED * max_body), max_body)

    def handlers(self) -> grpc.GenericRpcHandler:
        """What a server registers.

        As streams of one message, which is the same on the wire: who asks is then known before the message is there, and a
        message that does not come is not waited for.
        """
        methods = {
            name: grpc.stream_unary_rpc_method_handler(
                self._guarded(name, getattr(self, f"_{_snake(name)}")),
                request_deserializer=getattr(pb, f"{name}Request").FromString,
                response_serializer=getattr(pb, f"{name}Response").SerializeToString,
            )
            for name in _NEEDS
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    def _guarded(self, name: str, method: Callable[[Any, _Caller], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
        needed = _NEEDS[name]

        async def call(messages: AsyncIterator[Any], context: Any) -> Any:
            code, message, retry, request, held, size = grpc.StatusCode.OK, "", None, None, 0, 0
            try:
                given = dict(context.invocation_metadata() or ())
                # A browser cannot speak gRPC: there is no page to keep out.
                if needed is not None:
                    self._access.check_proxy(given)
                caller = "" if needed is None else self._access.check(given.get("authorization"), needed)
                if name == "ModelInfer":  # what is asked otherwise is answered at once, whatever its size
                    held = await self._room_for_one()
                request = await self._first(messages)
                if held:
                    size = request.ByteSize()
                    held = self._room.settle(held, size * _growth(request))
                response = await method(request, _Caller(caller, given.get("idempotency-key", ""), size))
            except Rejected as error:
                # "Full" is RESOURCE_EXHAUSTED, "not able to answer" is UNAVAILABLE; both are 503 over HTTP.
                full = error.status == 503 and "full" in error.message
                fallback = grpc.StatusCode.RESOURCE_EXHAUSTED if full else grpc.StatusCode.UNAVAILABLE
                code, message, retry = _CODES.get(error.status, fallback), error.message, error.retry_after_s
            except asyncio.CancelledError:
                raise
            except Exception as error:
                log("request crashed", level=logging.ERROR, problem=f"{type(error).__name__}: {error}")
                code, message = grpc.StatusCode.UNAVAILABLE, "the server failed on this request"
            finally:
                self._room.settle(held, 0)
            if name == "ModelInfer":
                model = request.model_name if request and request.model_name in self._inference.routed else ""
                self._inference.metrics.requests.labels(model, "grpc", code.name).inc()
            if code is not grpc.StatusCode.OK:
                trailing = (("retry-after", str(max(1, round(retry)))),) if retry is not None else ()
                await context.abort(code, message, trailing)
            return response

        return call

    async def _room_for_one(self) -> int:
        try:
            return await asyncio.wait_for(self._room.take(), self._request_timeout_s)
        except TimeoutError:
            raise Rejected(503, "the server is full; try again later", retry_after_s=1.0) from None

    async def _first(self, messages: AsyncIterator[Any]) -> Any:
        try:
            return await asyncio.wait_for(anext(messages), self._request_timeout_s)
        except TimeoutError:
            raise Rejected(408, "the request took too long to arrive") from None
        except DecodeError:
            raise Rejected(400, "the message is not one of this method") from None
        except StopAsyncIteration:
            raise Rejected(400, "the call ended without a request") from None

    async def _server_live(self, _: Any, __: _Caller) -> Any:
        return pb.ServerLiveResponse(live=True)

    async def _server_ready(self, _: Any, __: _Caller) -> Any:
        return pb.ServerReadyResponse(ready=self._inference.ready)

    async def _model_ready(self, request: Any, _: _Caller) -> Any:
        return pb.ModelReadyResponse(ready=model_ready(self._inference, request.name, request.version or None))

    async def _server_metadata(self, _: Any, __: _Caller) -> Any:
        return pb.ServerMetadataResponse(name="visionloop", version="", extensions=["binary_tensor_data"])

    async def _model_metadata(self, request: Any, _: _Caller) -> Any:
        deployment = self._inference.deployment(request.name, request.version or None)
        told = tensors.metadata(deployment.release, deployment.version)
        tensor = pb.ModelMetadataResponse.TensorMetadata
        return pb.ModelMetadataResponse(
            name=told["name"],
            versions=told["versions"],
            platform=told["platform"],
            inputs=[tensor(**one) for one in told["inputs"]],
            outputs=[tensor(**one) for one in told["outputs"]],
        )

    async def _model_infer(self, request: Any, caller: _Caller) -> Any:
        deployment = self._inference.deployment(request.model_name, request.model_version or None)
        wanted = [output.name for output in request.outputs]
        tensors.check_outputs(wanted)
        if len(request.id) > 128:
            raise Rejected(400, "the id is text of at most 128 characters")
        if caller.size > _LARGE and not request.raw_input_contents:
            pictures = await asyncio.to_thread(_pictures, deployment.release, request)
        else:
            pictures = _pictures(deployment.release, request)
        answered = await self._inference.answer(
            request.model_name,
            request.model_version or None,
            pictures,
            protocol="grpc",
            key=caller.key,
            caller=caller.name,
        )
        found = tensors.outputs(answered, wanted)
        tensor = pb.ModelInferResponse.InferOutputTensor
        return pb.ModelInferResponse(
            model_name=answered.deployment.model,
            model_version=answered.version,
            id=request.id,
            outputs=[tensor(name=one.name, datatype=one.datatype, shape=one.shape) for one in found],
            raw_output_contents=[one.raw for one in found],
        )


def _growth(request: Any) -> int:
    """How much more a message takes in memory than on its way: a number of a typed field may take a byte there."""
    if len(request.inputs) != 1:
        return 1  # refused before anything is made of it
    contents = request.inputs[0].contents
    return _UNPACKED if any(len(getattr(contents, name)) for name in _NUMBERS) else 1


def _pictures(release: Release, request: Any) -> list[tuple[Form, bytes]]:
    return tensors.pictures(release, [_input(request)])


def _input(request: Any) -> tensors.Given:
    raw = request.raw_input_contents
    if len(request.inputs) != 1:
        names = ", ".join(repr(tensor.name[:64]) for tensor in request.inputs[:4]) or "none"
        raise Rejected(400, f"expected exactly one input, {tensors.INPUT!r}; got {len(request.inputs)}: {names}")
    if len(raw) > 1:
        raise Rejected(400, f"{len(raw)} raw contents for 1 inputs; expected one each")
    (tensor,) = request.inputs
    if any(not 0 <= n < 1 << 31 for n in tensor.shape):
        raise Rejected(400, "the shape of an input is a list of whole numbers, none negative")
    # The field itself, not a list of it: what is wrong with it is seen without a copy.
    if raw:
        data: Any = raw[0]
    else:
        data = tensor.contents.bytes_contents if tensor.datatype == "BYTES" else tensor.contents.uint_contents
    return tensors.Given(tensor.name, tensor.datatype, tuple(tensor.shape), data)


def _snake(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")
