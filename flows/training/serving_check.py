"""The serving check: a packaged release is asked as it will be in production, before anything is registered.

The server of production is started with it and asked over HTTP and gRPC: every golden picture, what is no picture, and what
it says of the model. A release that passes its gates and does not serve is rejected by this, as by a gate.
"""

from __future__ import annotations

import http.client
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from components import plugins
from components.answering import Decision, decided, golden_vectors
from components.contracts.families import Task
from components.contracts.records import Record, Stored
from components.contracts.releases import Release
from components.contracts.verdicts import EngineVerdict, Finding, Verdict
from components.contracts.wording import counted
from components.releases import GOLDEN
from flows.training.inference_messages import METHOD, messages
from flows.training.trial_server import VERSION, DoesNotServe, TrialServer, placeless, trial_server

SERVES = "serves"
"""What its finding is called among those of the gates."""
LOG = "server.log"
_LIMIT_S = 60.0
_BYTES_A_SECOND = 20e6
"""A large release is copied and hashed four times before it answers: it has as much longer on a slow disk."""
_NO_PICTURE = b"This is a sentence and no picture."


class ServingCheck(Record):
    """What came of asking a server with a release."""

    finding: Finding
    timed_out: bool = False
    """Whether it failed by its time alone, which may be a busy machine's fault: then the next run asks again."""


def with_finding(verdict: Verdict, finding: Finding) -> Verdict:
    """The verdict with one more finding of the engine that serves; where that is no pass, the verdict is none either."""

    def told(engine: EngineVerdict) -> EngineVerdict:
        if engine.engine != verdict.serving_engine:
            return engine
        status = engine.status if finding.status == "pass" else "fail"
        return engine.model_copy(update={"findings": (*engine.findings, finding), "status": status})

    found = verdict.model_copy(update={"engines": tuple(told(engine) for engine in verdict.engines)})
    if finding.status == "pass":
        return found
    reason = f"{verdict.serving_engine}: {finding.gate}: {finding.message}"
    return found.model_copy(update={"status": "fail", "reasons": (*verdict.reasons, reason)})


def check(
    release: Stored[Release], *, out: Path, plugin_folder: Path | None = None, limit_s: float = _LIMIT_S
) -> ServingCheck:
    """Start a server with the release, ask it, and end it; `out` keeps its log.

    Raises EngineUnavailable where the machine, and not the release, is at fault.
    """
    scratch, log = out / "server", out / LOG
    limit_s += sum(file.bytes for file in release.record.files) / _BYTES_A_SECOND
    try:
        with trial_server(release, folder=scratch, log=log, plugins=plugin_folder, limit_s=limit_s) as server:
            worst = _Asking(release, server).ask()
    except DoesNotServe as error:
        return ServingCheck(finding=Finding(gate=SERVES, status="fail", message=str(error)), timed_out=error.timed_out)
    finally:
        if log.exists():
            log.write_text(placeless(log.read_text(errors="replace"), scratch))
        shutil.rmtree(scratch, ignore_errors=True)
    golden = golden_vectors(release.record, release.folder / GOLDEN)
    return ServingCheck(
        finding=Finding(
            gate=SERVES,
            status="pass",
            message=f"in a server, over HTTP and gRPC, {counted(len(golden.encoded), 'golden picture')} got the golden "
            f"answers (a probability differs by at most {worst:.2g}, accepted are {golden.tolerance:g}), and what is no "
            f"picture was refused; the server was ready after {server.ready_after_s:.1f} s",
            value=worst,
            threshold=golden.tolerance,
            n=len(golden.encoded),
        )
    )


class _Asking:
    """The questions to one server, and whether its answers are the release's."""

    def __init__(self, release: Stored[Release], server: TrialServer) -> None:
        self._release, self._server = release.record, server
        self._golden = golden_vectors(release.record, release.folder / GOLDEN)
        self._task: Task = plugins.load("tasks", release.record.task, dict(release.record.task_settings))

    def ask(self) -> float:
        """Ask everything; the largest difference of a probability. Raises DoesNotServe at the first wrong answer."""
        self._expect_ready()
        self._expect_metadata()
        worst = [self._of_picture(index) for index in range(len(self._golden.encoded))]
        self._expect_refusal()
        worst += self._over_grpc()
        self._expect_ready()
        return max(worst)

    def _http(self, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
        asking = f"{method} {path}"
        connection = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=self._server.left_s(asking))
        try:
            connection.request(method, path, body, {"content-type": "application/octet-stream"} if body else {})
            response = connection.getresponse()
            raw = response.read()
        except (OSError, http.client.HTTPException) as error:
            told = str(error) or type(error).__name__
            raise DoesNotServe(f"{asking}: no answer ({told})", timed_out=isinstance(error, TimeoutError)) from error
        finally:
            connection.close()
        try:
            return response.status, json.loads(raw)
        except ValueError:
            raise DoesNotServe(f"{asking}: status {response.status} and no JSON ({raw[:200]!r})") from None

    def _expect_ready(self) -> None:
        for path in ("/v2/health/ready", f"{self._address}/ready"):
            status, told = self._http("GET", path)
            if status != 200 or told.get("ready") is not True:
                raise DoesNotServe(f"GET {path}: status {status}, {_short(told)}; expected ready")

    @property
    def _address(self) -> str:
        return f"/v2/models/{quote(self._release.model, safe='')}"

    def _expect_metadata(self) -> None:
        status, told = self._http("GET", self._address)
        engine = self._release.engine
        size = engine.preprocessing
        expected = {
            "name": self._release.model,
            "versions": [VERSION],
            "shape": [-1, size.height, size.width, size.channels],
            "classes": list(engine.classes),
            "threshold": self._release.decision.threshold,
            "release": self._release.digest(),
        }
        try:
            parameters = told["parameters"]
            found = {
                "name": told["name"],
                "versions": told["versions"],
                "shape": told["inputs"][0]["shape"],
                **{name: parameters[name] for name in ("classes", "threshold", "release")},
            }
        except (KeyError, TypeError, IndexError):
            raise DoesNotServe(
                f"GET {self._address}: status {status}, {_short(told)}; expected the model's metadata"
            ) from None
        wrong = [
            f"{name} {_short(found[name])}, expected {_short(expected[name])}"
            for name in found
            if found[name] != expected[name]
        ]
        if wrong:
            raise DoesNotServe(f"GET {self._address}: {'; '.join(wrong)}")

    def _of_picture(self, index: int) -> float:
        path = f"/predict?top={len(self._release.engine.classes)}"
        status, told = self._http("POST", path, self._golden.encoded[index])
        what = f"POST {path} with golden picture {index}"
        if status != 200:
            raise DoesNotServe(f"{what}: status {status}, {_short(told)}")
        if told.get("release") != self._release.digest():
            raise DoesNotServe(f"{what}: release {told.get('release')!r} answered, expected {self._release.digest()}")
        return self._difference(what, index, told)

    def _expect_refusal(self) -> None:
        status, told = self._http("POST", "/predict", _NO_PICTURE)
        if not (400 <= status < 500 and isinstance(told, dict) and told.get("error")):
            raise DoesNotServe(
                f"POST /predict with a sentence for a picture: status {status}, {_short(told)}; expected a refusal with its "
                f"reason"
            )

    def _over_grpc(self) -> list[float]:
        """Each golden picture as the pixels that the engine takes."""
        import grpc

        from serving.protocols.tensors import INPUT

        known = messages()
        worst = []
        # A proxy of the environment is for other machines than this one.
        with grpc.insecure_channel(f"127.0.0.1:{self._server.grpc_port}", [("grpc.enable_http_proxy", 0)]) as channel:
            infer = channel.unary_unary(
                METHOD,
                request_serializer=known["Request"].SerializeToString,
                response_deserializer=known["Response"].FromString,
            )
            for index, pixels in enumerate(self._golden.pixels):
                what = f"gRPC ModelInfer with golden picture {index}"
                tensor = known["Tensor"](name=INPUT, datatype="UINT8", shape=[1, *pixels.shape])
                request = known["Request"](
                    model_name=self._release.model, inputs=[tensor], raw_input_contents=[pixels.tobytes()]
                )
                try:
                    response = infer(request, timeout=self._server.left_s(what))
                except grpc.RpcError as error:
                    late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                    raise DoesNotServe(f"{what}: {error.code().name}, {error.details()}", timed_out=late) from error
                worst.append(self._difference(what, index, _of_tensors(response)))
        return worst

    def _difference(self, what: str, index: int, told: Mapping[str, Any]) -> float:
        """The largest difference of a number of an answer from the golden one's; raises DoesNotServe for one too large, and
        where the label is not what the release's rule makes of the numbers."""
        classes, expected = self._release.engine.classes, self._golden.probabilities[index][None]
        wanted: Decision = self._decided(expected)
        differences, served = [], None
        try:
            differences.append(abs(float(told["confidence"]) - wanted.confidence))
            for field in self._task.outputs(classes):
                if field.datatype != "FP32":
                    continue
                right = np.asarray(field.values(expected), dtype=np.float32)[0]
                values = told[field.name]
                listed = [values[name] for name in classes] if isinstance(values, Mapping) else values
                numbers = np.asarray(listed, dtype=np.float32).reshape(right.shape)
                differences.append(float(np.abs(numbers - right).max(initial=0.0)))
                if np.array_equal(right, expected[0]):
                    served = numbers  # the very numbers that the label is read from
            label, unsure = str(told["label"]), bool(told["unsure"])
        except (KeyError, TypeError, ValueError) as error:
            raise DoesNotServe(f"{what}: {_short(dict(told))} is no answer of this release ({error!r})") from None
        worst = max(differences)
        if not worst <= self._golden.tolerance:  # what is no number differs by more than anything
            raise DoesNotServe(
                f"{what}: a probability differs by {worst:.3f} from the golden one, accepted are {self._golden.tolerance:g}"
            )
        rule = wanted if served is None else self._decided(served[None])
        if (label, unsure) != (rule.label, rule.unsure):
            raise DoesNotServe(
                f"{what}: {label!r} (unsure: {unsure}) with confidence {told['confidence']}; by the release's decision rule "
                f"it is {rule.label!r} (unsure: {rule.unsure})"
            )
        return worst

    def _decided(self, probabilities: npt.NDArray[np.float32]) -> Decision:
        return decided(self._release, self._task, probabilities)[0]


def _of_tensors(response: Any) -> dict[str, Any]:
    """The first picture's outputs of a gRPC response, as HTTP's answer has them."""
    found: dict[str, Any] = {}
    for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if tensor.datatype == "BYTES":
            found[tensor.name] = raw[4:].decode(errors="replace")  # behind its length
        else:
            kind = {"FP32": "<f4", "BOOL": "|b1", "INT64": "<i8"}[tensor.datatype]
            values = np.frombuffer(raw, dtype=kind).reshape(tuple(tensor.shape))[0]
            found[tensor.name] = values.tolist()
    return found


def _short(told: Any) -> str:
    return json.dumps(told, default=str, ensure_ascii=False)[:200]
