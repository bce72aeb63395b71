"""The Open Inference Protocol, spoken by Triton's own client over HTTP and gRPC."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from served import MODEL, Server, jpeg, png
from shapes import KINDS, picture

CODE = Path(__file__).resolve().parents[2]

PIXELS = np.stack([picture(kind, 8000)[..., None] for kind in KINDS])


def client_of(running: Server, protocol: str) -> tuple[Any, Any]:
    if protocol == "http":
        return triton_http, triton_http.InferenceServerClient(f"127.0.0.1:{running.port}")
    return triton_grpc, triton_grpc.InferenceServerClient(f"127.0.0.1:{running.grpc_port}")


@pytest.fixture(params=["http", "grpc"])
def triton(request: pytest.FixtureRequest, running: Server) -> tuple[Any, Any]:
    return client_of(running, request.param)


def test_health_and_metadata(triton: tuple[Any, Any]) -> None:
    _, client = triton
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL)
    found = client.get_model_metadata(MODEL)
    told = found if isinstance(found, dict) else json.loads(_json(found))
    assert told["name"] == MODEL
    assert told["versions"] == ["1"]
    assert told["platform"] == "openvino_int8"
    (given,) = told["inputs"]
    assert (given["name"], given["datatype"], [int(n) for n in given["shape"]]) == ("images", "UINT8", [-1, 16, 16, 1])
    outputs = {one["name"]: (one["datatype"], [int(n) for n in one["shape"]]) for one in told["outputs"]}
    assert outputs == {
        "label": ("BYTES", [-1]),
        "unsure": ("BOOL", [-1]),
        "confidence": ("FP32", [-1]),
        "probabilities": ("FP32", [-1, 3]),
        "embedding": ("FP32", [-1, 16]),
        "prediction_id": ("BYTES", [-1]),
    }
    if "parameters" in told:  # gRPC has none
        names = ("encoded_input", "classes", "threshold", "label_when_unsure", "release")
        assert tuple(told["parameters"]) == names  # and no thresholds of critical classes, of which there are none
        assert told["parameters"]["classes"] == sorted(KINDS)


@pytest.mark.parametrize("version", ["", "1"])
def test_the_configuration_is_that_of_the_metadata(triton: tuple[Any, Any], version: str) -> None:
    library, client = triton
    found = client.get_model_config(MODEL, version)
    told = found if isinstance(found, dict) else json.loads(_json(found, preserving_proto_field_name=True))["config"]
    assert (told["name"], told["platform"], told["max_batch_size"]) == (MODEL, "openvino_int8", 64)
    assert "dynamic_batching" in told
    (given,) = told["input"]
    assert (given["name"], given["data_type"], [int(n) for n in given["dims"]]) == ("images", "TYPE_UINT8", [16, 16, 1])
    outputs = {one["name"]: (one["data_type"], [int(n) for n in one.get("dims", [])]) for one in told["output"]}
    assert outputs["label"] == ("TYPE_STRING", [])
    assert outputs["unsure"] == ("TYPE_BOOL", [])
    assert outputs["probabilities"] == ("TYPE_FP32", [3])
    server = client.get_server_metadata()
    extensions = server["extensions"] if isinstance(server, dict) else server.extensions
    assert list(extensions) == ["binary_tensor_data", "model_configuration"]
    with pytest.raises(library.InferenceServerException, match="version '9' of shapes is not served; now it is 1"):
        client.get_model_config(MODEL, "9")


def _json(message: Any, **options: Any) -> str:
    from google.protobuf.json_format import MessageToJson

    return str(MessageToJson(message, **options))


@pytest.mark.parametrize("binary", [True, False])
def test_pixels_in_labels_out(triton: tuple[Any, Any], binary: bool) -> None:
    library, client = triton
    given = library.InferInput("images", list(PIXELS.shape), "UINT8")
    given.set_data_from_numpy(PIXELS, **({"binary_data": binary} if library is triton_http else {}))
    wanted = [
        library.InferRequestedOutput(name, **({"binary_data": binary} if library is triton_http else {}))
        for name in ("label", "probabilities", "unsure", "prediction_id", "embedding", "confidence")
    ]
    result = client.infer(MODEL, [given], outputs=wanted, request_id=f"batch-{library.__name__}-{binary}")
    assert [_text(x) for x in result.as_numpy("label")] == list(KINDS)
    probabilities = result.as_numpy("probabilities")
    assert probabilities.shape == (3, 3)
    assert probabilities.sum(axis=1) == pytest.approx(1.0, abs=1e-5)
    assert probabilities.max(axis=1) == pytest.approx(result.as_numpy("confidence"))
    assert result.as_numpy("embedding").shape == (3, 16)
    assert result.as_numpy("unsure").dtype == np.bool_
    assert len({_text(x) for x in result.as_numpy("prediction_id")}) == 3
    told = result.get_response()
    version = told["model_version"] if isinstance(told, dict) else told.model_version
    assert version == "1"


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def test_encoded_pictures_in_the_same_answers_out(triton: tuple[Any, Any], running: Server) -> None:
    library, client = triton
    files = [png("disc", 1), png("cross", 2), jpeg("stripes", 3)]
    given = library.InferInput("images", [3], "BYTES")
    given.set_data_from_numpy(np.array(files, dtype=np.object_))
    result = client.infer(MODEL, [given])
    for index, data in enumerate(files):
        alone = running.predict(data).json
        classes = sorted(alone["probabilities"])
        assert result.as_numpy("probabilities")[index] == pytest.approx(
            [alone["probabilities"][name] for name in classes], abs=0.02
        )
        assert _text(result.as_numpy("label")[index]) == alone["label"]


def test_the_same_key_is_answered_once_and_a_request_id_is_no_key(triton: tuple[Any, Any]) -> None:
    library, client = triton
    ids = []
    for picture_of, headers in ((0, True), (0, True), (1, False), (2, False)):
        given = library.InferInput("images", [1, 16, 16, 1], "UINT8")
        given.set_data_from_numpy(PIXELS[picture_of : picture_of + 1])
        key = {"idempotency-key": f"same-{library.__name__}"} if headers else None
        result = client.infer(MODEL, [given], request_id="1", headers=key)
        ids.append(_text(result.as_numpy("prediction_id")[0]))
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3


Change = Callable[[Any], Any]


@pytest.mark.parametrize(
    ("name", "shape", "datatype", "data", "why"),
    [
        ("pictures", [1, 16, 16, 1], "UINT8", PIXELS[:1], "expected exactly one input, 'images'"),
        (
            "images",
            [1, 16, 16, 1],
            "FP32",
            np.full((1, 16, 16, 1), np.nan, dtype=np.float32),
            "datatype 'FP32'; expected UINT8",
        ),
        ("images", [1, 15, 16, 1], "UINT8", PIXELS[:1, :15], r"shape \[1, 15, 16, 1\]; expected \[n, 16, 16, 1\]"),
        ("images", [16, 16, 1], "UINT8", PIXELS[0], "expected"),
        ("images", [65, 16, 16, 1], "UINT8", np.zeros((65, 16, 16, 1), dtype=np.uint8), "65 pictures in one request"),
        ("images", [2], "BYTES", np.array([b"x", png("disc", 1)], dtype=np.object_), "picture 0: not an image"),
    ],
)
def test_wrong_tensors_are_refused(
    triton: tuple[Any, Any], name: str, shape: list[int], datatype: str, data: Any, why: str
) -> None:
    library, client = triton
    given = library.InferInput(name, shape, datatype)
    given.set_data_from_numpy(data)
    with pytest.raises(library.InferenceServerException, match=why):
        client.infer(MODEL, [given])


def test_unknown_models_versions_and_outputs_are_refused(triton: tuple[Any, Any]) -> None:
    library, client = triton
    given = library.InferInput("images", [1, 16, 16, 1], "UINT8")
    given.set_data_from_numpy(PIXELS[:1])
    with pytest.raises(library.InferenceServerException, match="unknown model 'other'; served here: shapes"):
        client.infer("other", [given])
    with pytest.raises(library.InferenceServerException, match="version '9' of shapes is not served; now it is 1"):
        client.infer(MODEL, [given], model_version="9")
    with pytest.raises(library.InferenceServerException, match="unknown output 'boxes'; valid: label"):
        client.infer(MODEL, [given], outputs=[library.InferRequestedOutput("boxes")])


def _shared(tensor: Any) -> Any:
    tensor.set_shared_memory("region", 256)
    return tensor


@pytest.mark.parametrize(
    ("ask", "why"),
    [
        ({"class_count": 2}, "classification of output 'label': no classification strings"),
        ({"shared_output": True}, "shared_memory_.* of output 'label': shared memory is not supported"),
        ({"shared_input": True}, "shared_memory_.* of input 'images': shared memory is not supported"),
        ({"sequence_id": 7}, "sequence_.* of the request: there are no sequences"),
        ({"sequence_id": "seven"}, "sequence_.* of the request: there are no sequences"),
        ({"priority": 1}, "priority of the request: there are no priorities"),
        ({"timeout": 1000}, "timeout of the request: .*deadline in the client"),
        ({"parameters": {"top": 3}}, "unknown parameter 'top' of the request"),
        ({"parameters": {"classification": 3}}, "classification of the request: no classification strings"),
        ({"timeout": 0, "priority": 0, "sequence_id": 0}, ""),
    ],
)
def test_what_would_have_no_effect_is_refused(triton: tuple[Any, Any], ask: dict[str, Any], why: str) -> None:
    library, client = triton
    ask = dict(ask)
    given = library.InferInput("images", [1, 16, 16, 1], "UINT8")
    given.set_data_from_numpy(PIXELS[:1])
    wanted = library.InferRequestedOutput("label", class_count=ask.pop("class_count", 0))
    given = _shared(given) if ask.pop("shared_input", False) else given
    wanted = _shared(wanted) if ask.pop("shared_output", False) else wanted
    if not why:
        assert _text(client.infer(MODEL, [given], outputs=[wanted], **ask).as_numpy("label")[0]) == KINDS[0]
        return
    with pytest.raises(library.InferenceServerException, match=why):
        client.infer(MODEL, [given], outputs=[wanted], **ask)


@pytest.mark.parametrize(
    ("where", "field", "value", "why"),
    [
        ((), "model_name", "other", "model_name of the body is 'other'; this address answers for 'shapes'"),
        ((), "model_version", "9", "model_version of the body is '9'; this address answers for '1'"),
        ((), "priority", 1, "unknown field 'priority' of the request"),
        ((), "parameters", [], "parameters of the request are an object"),
        ((), "parameters", {"binary_data_output": "false"}, "binary_data_output of the request is true or false"),
        ((), "id", 0, "the id is text"),
        ((), "outputs", "label", "outputs is a list"),
        ((), "outputs", {}, "outputs is a list"),
        ((), "outputs", [{"name": "label", "datatype": "BYTES"}], "unknown field 'datatype' of output 'label'"),
        ((), "outputs", [{"name": "label", "parameters": {"binary_data": 0}}], "binary_data of output 'label' is true or"),
        (("inputs", 0), "content_type", "np", "unknown field 'content_type' of input 'images'"),
        (("inputs", 0), "parameters", {"content_type": "np"}, "unknown parameter 'content_type' of input 'images'"),
        (("inputs", 0), "parameters", {"binary_data_size": 0}, "data or binary_data_size, not both"),
        (("inputs", 0), "parameters", {"binary_data_size": True}, "binary_data_size of input 'images' is a whole number"),
        ((), "model_name", MODEL, ""),
        ((), "parameters", None, ""),
    ],
)
def test_fields_that_would_have_no_effect_are_refused(
    running: Server, where: tuple[Any, ...], field: str, value: Any, why: str
) -> None:
    body: Any = {"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 16, 16, 1], "data": [0] * 256}]}
    place = body
    for step in where:
        place = place[step]
    place[field] = value
    reply = running.ask("POST", f"/v2/models/{MODEL}/infer", json.dumps(body).encode())
    assert (reply.status, why in reply.json.get("error", "")) == (400 if why else 200, True), reply.body


def test_grpc_contents_that_would_have_no_effect_are_refused(running: Server) -> None:
    from tritonclient.grpc import service_pb2

    _, client = client_of(running, "grpc")

    def sent(*, data: int = 256, raw: bytes | None = None, **fields: Any) -> Any:
        request = service_pb2.ModelInferRequest(model_name=MODEL, raw_input_contents=[] if raw is None else [raw])
        tensor = request.inputs.add(name="images", datatype="UINT8", shape=[1, 16, 16, 1])
        for name, value in fields.items():
            getattr(tensor.contents, name).extend(value)
        if data != 256:
            tensor.parameters["binary_data_size"].int64_param = data
        return client._client_stub.ModelInfer(request, timeout=30)

    import grpc

    pixels = bytes(256)
    assert sent(uint_contents=pixels).model_name == sent(raw=pixels).model_name == MODEL
    for kwargs, why in [
        ({"int_contents": [0] * 256}, "int_contents hold no UINT8; fill uint_contents"),
        ({"uint_contents": pixels, "fp32_contents": [0.5]}, "fp32_contents hold no UINT8; fill uint_contents"),
        ({"raw": pixels, "uint_contents": pixels}, "contents or raw contents, not both"),
        ({"raw": pixels, "data": 255}, "not the size of the raw contents"),
    ]:
        with pytest.raises(grpc.RpcError) as caught:
            sent(**kwargs)  # type: ignore[arg-type]
        assert (caught.value.code(), why in caught.value.details()) == (grpc.StatusCode.INVALID_ARGUMENT, True)


def test_parts_of_the_protocol_that_are_not_done_say_so(triton: tuple[Any, Any]) -> None:
    library, client = triton
    for call in (
        lambda: client.get_inference_statistics(MODEL),
        client.get_model_repository_index,
        client.get_system_shared_memory_status,
        client.get_cuda_shared_memory_status,
        client.unregister_system_shared_memory,
        lambda: client.register_system_shared_memory("a", "/a", 10),
        client.get_trace_settings,
        client.get_log_settings,
        lambda: client.load_model(MODEL),
        lambda: client.unload_model(MODEL),
    ):
        with pytest.raises(library.InferenceServerException, match="not done by this server; it has"):
            call()


def test_the_time_of_a_picture_is_kept_over_grpc_too(running: Server) -> None:
    library, client = client_of(running, "grpc")
    given = library.InferInput("images", [1, 16, 16, 1], "UINT8")
    given.set_data_from_numpy(PIXELS[:1])
    client.infer(MODEL, [given], headers={"x-event-time": "2026-03-01T14:00:00Z"})
    with pytest.raises(library.InferenceServerException, match="not ISO 8601"):
        client.infer(MODEL, [given], headers={"x-event-time": "yesterday"})


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "not JSON"),
        (b"[]", "not a v2"),
        (b'{"inputs": 3}', "not a v2"),
        (b'{"inputs": [{}]}', "not a v2"),
        (b'{"inputs": []}', "expected exactly one input"),
        (b'{"inputs":[{"name":"images","datatype":"UINT8","shape":[1,16,16,1],"data":[NaN]}]}', "not JSON"),
        (b'{"inputs":[{"name":"images","datatype":"UINT8","shape":[-1,16,16,1],"data":[]}]}', "none negative"),
        (b'{"inputs":[{"name":"images","datatype":"UINT8","shape":[0,16,16,1],"data":[]}]}', "0 pictures"),
        (b'{"inputs":[{"name":"images","datatype":"UINT8","shape":[1,16,16,1],"data":[1,2,3]}]}', "3 values"),
        (b'{"inputs":[{"name":"images","datatype":"UINT8","shape":[1,16,16,1],"data":["a"]}]}', "whole numbers"),
        (
            b'{"inputs":[{"name":"images","datatype":"UINT8","shape":[1,16,16,1],"data":'
            + str([256] * 256).encode()
            + b"}]}",
            "outside 0 to 255",
        ),
        (
            b'{"inputs":[{"name":"images","datatype":"UINT8","shape":[1,16,16,1],"data":'
            + str([0.5] * 256).encode()
            + b"}]}",
            "whole numbers",
        ),
        (b'{"inputs":[{"name":"images","datatype":"BYTES","shape":[1],"data":["text"]}]}', "binary data"),
        (
            b'{"inputs":[{"name":"images","datatype":"UINT8","shape":[1,16,16,1],"parameters":{"binary_data_size":9999}}]}',
            "more than the body holds",
        ),
        (b'{"inputs":[],"id":' + b'"' + b"x" * 300 + b'"}', "at most 128"),
    ],
)
def test_bodies_that_are_no_requests_are_refused(running: Server, body: bytes, why: str) -> None:
    import re

    reply = running.ask("POST", f"/v2/models/{MODEL}/infer", body)
    assert reply.status == 400, reply.body
    assert re.search(why, reply.json["error"]), reply.body


def test_binary_lengths_that_lie_are_refused(running: Server) -> None:
    told = b'{"inputs":[{"name":"images","datatype":"BYTES","shape":[1],"parameters":{"binary_data_size":8}}]}'
    for header, tail in [
        ("99999", b""),
        ("x", b""),
        (str(len(told)), b"\xff\xff\xff\x7fabcd"),
        (str(len(told)), b"12345678z"),
    ]:
        reply = running.ask("POST", f"/v2/models/{MODEL}/infer", told + tail, {"inference-header-content-length": header})
        assert reply.status == 400, reply


def test_a_grpc_message_over_the_limit_is_refused(running: Server) -> None:
    _, client = client_of(running, "grpc")
    given = triton_grpc.InferInput("images", [1], "BYTES")
    given.set_data_from_numpy(np.array([b"x" * (3 << 20)], dtype=np.object_))
    with pytest.raises(triton_grpc.InferenceServerException, match="RESOURCE_EXHAUSTED|larger than max"):
        client.infer(MODEL, [given])


def test_the_generated_code_is_that_of_the_protocol_files(tmp_path: Path) -> None:
    protocols = sorted(path.relative_to(CODE) for path in CODE.glob("serving/protocols/*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--python_out={tmp_path}", *map(str, protocols)]
    subprocess.run(command, cwd=CODE, check=True)
    assert [path.name for path in protocols] == ["health.proto", "open_inference.proto"]
    for path in sorted(tmp_path.glob("serving/protocols/*.py")):
        assert path.read_text() == (CODE / "serving" / "protocols" / path.name).read_text()


def test_outputs_asked_for_twice_are_refused(running: Server) -> None:
    outputs = ",".join(['{"name":"embedding"}'] * 5000)
    body = '{"inputs":[{"name":"images","datatype":"UINT8","shape":[1,16,16,1],"data":%s}],"outputs":[%s]}'
    reply = running.ask(
        "POST", f"/v2/models/{MODEL}/infer", body.replace("%s", str([0] * 256), 1).replace("%s", outputs, 1).encode()
    )
    assert (reply.status, reply.json) == (400, {"error": "an output is asked for twice"})


def test_text_for_pixels_costs_no_memory(running: Server) -> None:
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 16, 16, 1], "data": ["x" * 200_000, *["a"] * 255]}
    body = json.dumps({"inputs": [tensor]}).encode()
    assert running.ask("POST", f"/v2/models/{MODEL}/infer", body).status == 400


def test_nested_lists_are_taken_as_flat_ones(running: Server) -> None:
    body = '{"inputs":[{"name":"images","datatype":"UINT8","shape":[1,16,16,1],"data":%s}]}'
    nested, flat = PIXELS[:1].tolist(), PIXELS[0].ravel().tolist()
    answers = [running.ask("POST", f"/v2/models/{MODEL}/infer", (body % data).encode()) for data in (nested, flat)]
    assert [answer.status for answer in answers] == [200, 200]
    first, second = (
        next(output["data"] for output in answer.json["outputs"] if output["name"] == "probabilities") for answer in answers
    )
    assert first == second


def test_the_messages_of_grpc_are_bounded_together() -> None:
    from serving.inference import Rejected
    from serving.protocols.access import Room

    async def act() -> None:
        room = Room(40, 16)
        held = [await room.take(), await room.take()]
        third = asyncio.ensure_future(room.take())
        await asyncio.sleep(0)
        assert not third.done()  # 8 are left, and it may need 16
        held[0] = room.settle(held[0], 5)
        assert await asyncio.wait_for(third, 10) == 16
        with pytest.raises(Rejected, match="full"):
            room.settle(held[1], 20)  # unpacked it takes more than is left
        given_back = [room.settle(one, 0) for one in (*held, 16)]
        assert given_back == [0, 0, 0]
        assert [await asyncio.wait_for(room.take(), 10) for _ in range(2)] == [16, 16]

    asyncio.run(act())


def test_a_large_message_of_typed_values_counts_as_what_it_unpacks_to() -> None:
    # In a process of its own: Triton's client, which is loaded here, registers messages of the same names.
    code = """
from serving.protocols import open_inference_pb2 as pb
from serving.protocols.grpc import _growth
numbers, pictures, raw, many = (pb.ModelInferRequest() for _ in range(4))
numbers.inputs.add().contents.uint_contents.extend([1] * 1000)
numbers.raw_input_contents.append(b"x")
pictures.inputs.add().contents.bytes_contents.append(b"x" * 1000)
raw.inputs.add()
raw.raw_input_contents.append(b"x" * 1000)
for _ in range(3):
    many.inputs.add().contents.uint_contents.append(1)
print([_growth(one) for one in (numbers, pictures, raw, many)])
"""
    assert _alone(code) == "[8, 1, 1, 1]"


def test_every_datatype_of_a_task_s_outputs_has_its_name_in_the_configuration() -> None:
    code = """
from typing import get_args, get_type_hints
import numpy, numpy.typing
from components.contracts.families import OutputField
from serving.protocols import open_inference_pb2 as pb
from serving.protocols.tensors import _CONFIGURED
known = get_args(get_type_hints(OutputField, localns={"np": numpy, "npt": numpy.typing})["datatype"])
print({name: pb.DataType.Value(_CONFIGURED[name]) for name in sorted(known)})
"""
    # The numbers are Triton's.
    assert _alone(code) == "{'BOOL': 1, 'BYTES': 13, 'FP32': 11, 'INT64': 9}"


def _alone(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=CODE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_what_came_through_a_proxy_is_refused_over_grpc_too(running: Server) -> None:
    client = triton_grpc.InferenceServerClient(f"127.0.0.1:{running.grpc_port}")
    assert client.get_server_metadata().name == "visionloop"
    with pytest.raises(triton_grpc.InferenceServerException, match=r"PERMISSION_DENIED.*--require-token"):
        client.get_server_metadata(headers={"x-forwarded-for": "203.0.113.9"})
    assert client.is_server_live(headers={"x-forwarded-for": "203.0.113.9"})  # a probe
