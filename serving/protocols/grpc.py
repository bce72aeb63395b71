"""The Open Inference Protocol and the health service over gRPC: the same answers, refusals and bounds as over HTTP."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError

from components.contracts.releases import Release
from components.contracts.wording import counted
from serving.engines.frames import Form
from serving.inference import Inference, Rejected, moment
from serving.metrics import log
from serving.protocols import health_pb2, tensors
from serving.protocols import open_inference_pb2 as pb
from serving.protocols.access import Access, Room, model_ready
from serving.protocols.auth import TokenRole

SERVICE = "inference.GRPCInferenceService"
HEALTH = "grpc.health.v1.Health"
_LARGE = 1 << 20
_UNPACKED = 8
_NUMBERS = ("int_contents", "int64_contents", "uint_contents", "uint64_contents")
_WATCH_S = 0.2
"""How soon who watches is told of a change."""
_MOST_WATCHES = 64
"""Each takes one of the server's calls for as long as it lasts; half of them are left for answers."""
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    422: grpc.StatusCode.INVALID_ARGUMENT,
}
_NEEDS: dict[str, TokenRole | None] = {
    "ServerLive": None,
    "ServerReady": None,
    "ModelReady": None,
    "ServerMetadata": "viewer",
    "ModelMetadata": "viewer",
    "ModelConfig": "viewer",
    "ModelInfer": "predictor",
}
_HEALTH_NEEDS: dict[str, TokenRole | None] = {"Check": None, "List": "viewer"}


@dataclass(frozen=True)
class _Caller:
    name: str
    key: str
    event_time: str | None
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
        self._watches = 0

    def handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        """What a server registers.

        As streams of one message, which is the same on the wire: who asks is then known before the message is there, and a
        message that does not come is not waited for.
        """
        infer = {name: self._handler(name, needed, pb, name) for name, needed in _NEEDS.items()}
        health = {name: self._handler(name, needed, health_pb2, f"Health{name}") for name, needed in _HEALTH_NEEDS.items()}
        health["Watch"] = grpc.stream_stream_rpc_method_handler(
            self._watch,
            request_deserializer=health_pb2.HealthCheckRequest.FromString,
            response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
        )
        return (
            grpc.method_handlers_generic_handler(SERVICE, infer),
            grpc.method_handlers_generic_handler(HEALTH, health),
            _Unsupported(),
        )

    def _handler(self, name: str, needed: TokenRole | None, messages: Any, prefix: str) -> Any:
        return grpc.stream_unary_rpc_method_handler(
            self._guarded(name, needed, getattr(self, f"_{_snake(name)}")),
            request_deserializer=getattr(messages, f"{prefix}Request").FromString,
            response_serializer=getattr(messages, f"{prefix}Response").SerializeToString,
        )

    def _guarded(
        self, name: str, needed: TokenRole | None, method: Callable[[Any, _Caller], Awaitable[Any]]
    ) -> Callable[[Any, Any], Awaitable[Any]]:
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
                asking = _Caller(caller, given.get("idempotency-key", ""), given.get("x-event-time"), size)
                response = await method(request, asking)
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

    async def _check(self, request: Any, _: _Caller) -> Any:
        status = self._status_of(request.service)
        if status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            raise Rejected(404, f"no such service; {SERVICE}, a model's name, or nothing for the whole server")
        return health_pb2.HealthCheckResponse(status=status)

    async def _list(self, _: Any, __: _Caller) -> Any:
        names = ("", SERVICE, *self._inference.routed)
        statuses = {name: health_pb2.HealthCheckResponse(status=self._status_of(name)) for name in names}
        return health_pb2.HealthListResponse(statuses=statuses)

    async def _watch(self, messages: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        if self._watches >= _MOST_WATCHES:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{self._watches} watch already; call Check")
        self._watches += 1
        try:
            told, service = None, (await self._first(messages)).service
            while True:
                stopping, status = self._inference.draining, self._status_of(service)
                if status != told:
                    yield health_pb2.HealthCheckResponse(status=status)
                    told = status
                if stopping:
                    return  # a server that stops waits for nobody who only watches
                await asyncio.sleep(_WATCH_S)
        except Rejected as error:
            await context.abort(_CODES[error.status], error.message)
        finally:
            self._watches -= 1

    def _status_of(self, service: str) -> Any:
        """Whether the whole server, or the model of this name, answers now."""
        try:
            ready = self._inference.ready if service in ("", SERVICE) else model_ready(self._inference, service, None)
        except Rejected as error:
            return health_pb2.HealthCheckResponse.ServingStatus.Value(
                "SERVICE_UNKNOWN" if error.status == 404 else "NOT_SERVING"
            )
        return health_pb2.HealthCheckResponse.ServingStatus.Value("SERVING" if ready else "NOT_SERVING")

    async def _server_live(self, _: Any, __: _Caller) -> Any:
        return pb.ServerLiveResponse(live=True)

    async def _server_ready(self, _: Any, __: _Caller) -> Any:
        return pb.ServerReadyResponse(ready=self._inference.ready)

    async def _model_ready(self, request: Any, _: _Caller) -> Any:
        return pb.ModelReadyResponse(ready=model_ready(self._inference, request.name, request.version or None))

    async def _server_metadata(self, _: Any, __: _Caller) -> Any:
        return pb.ServerMetadataResponse(name="visionloop", version="", extensions=tensors.EXTENSIONS)

    async def _model_metadata(self, request: Any, _: _Caller) -> Any:
        deployment = self._inference.deployment(request.name, request.version or None)
        told = tensors.metadata(deployment)
        tensor = pb.ModelMetadataResponse.TensorMetadata
        return pb.ModelMetadataResponse(
            name=told["name"],
            versions=told["versions"],
            platform=told["platform"],
            inputs=[tensor(**one) for one in told["inputs"]],
            outputs=[tensor(**one) for one in told["outputs"]],
        )

    async def _model_config(self, request: Any, _: _Caller) -> Any:
        deployment = self._inference.deployment(request.name, request.version or None)
        return pb.ModelConfigResponse(config=ParseDict(tensors.configuration(deployment), pb.ModelConfig()))

    async def _model_infer(self, request: Any, caller: _Caller) -> Any:
        deployment = self._inference.deployment(request.model_name, request.model_version or None)
        tensors.check_parameters("the request", _values(request.parameters), {})
        for output in request.outputs:
            tensors.check_parameters(f"output {output.name[:64]!r}", _values(output.parameters), {})
        wanted = [output.name for output in request.outputs]
        tensors.check_outputs(deployment, wanted)
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
            event_at=moment(caller.event_time),
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
        raise Rejected(400, f"{counted(len(raw), 'raw content')} for 1 input; expected one")
    (tensor,) = request.inputs
    if any(not 0 <= n < 1 << 31 for n in tensor.shape):
        raise Rejected(400, "the shape of an input is a list of whole numbers, none negative")
    parameters = _values(tensor.parameters)
    # KServe's client tells the size of what it sends, as over HTTP.
    tensors.check_parameters(f"input {tensor.name[:64]!r}", parameters, {"binary_data_size": int})
    if "binary_data_size" in parameters and parameters["binary_data_size"] != sum(map(len, raw)):
        raise Rejected(400, "binary_data_size is not the size of the raw contents")
    field = "bytes_contents" if tensor.datatype == "BYTES" else "uint_contents"
    for filled, _ in tensor.contents.ListFields():
        if raw:
            raise Rejected(400, "an input has contents or raw contents, not both")
        if filled.name != field:
            raise Rejected(400, f"{filled.name} hold no {tensor.datatype[:16]}; fill {field}")
    # The field itself, not a list of it: what is wrong with it is seen without a copy.
    data: Any = raw[0] if raw else getattr(tensor.contents, field)
    return tensors.Given(tensor.name, tensor.datatype, tuple(tensor.shape), data)


def _values(parameters: Mapping[str, Any]) -> dict[str, Any]:
    chosen = {name: value.WhichOneof("parameter_choice") for name, value in parameters.items()}
    return {name: getattr(parameters[name], choice) if choice else None for name, choice in chosen.items()}


class _Unsupported(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Says of the protocol's methods that are not done here what there is instead."""

    def service(self, details: Any) -> Any:
        service, _, method = details.method.strip("/").partition("/")

        async def refuse(_: Any, context: Any) -> None:
            text = f"{method[:64]} is not done by this server; it has {', '.join(_NEEDS)}"
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, text)

        return grpc.stream_unary_rpc_method_handler(refuse) if service == SERVICE else None


def _snake(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")
