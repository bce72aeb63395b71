"""The HTTP side: picture upload, the Open Inference Protocol, metrics and pages. Errors say what to do and nothing else.

| route                                                  | needs     |
|--------------------------------------------------------|-----------|
| POST /predict                                          | predictor |
| POST /v2/models/{m}[/versions/{v}]/infer               | predictor |
| GET  /v2, /v2/models/{m}[/versions/{v}][/config]       | viewer    |
| GET  /status                                           | viewer    |
| GET  /metrics                                          | viewer    |
| GET  /, /docs, /openapi.json: the same on every server | nobody    |
| POST /admin/refresh                                    | admin     |
| GET  /v2/health/live, /v2/health/ready, .../ready      | nobody    |
"""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.staticfiles import StaticFiles

from serving.engines.deployment import Deployment
from serving.engines.frames import Form
from serving.inference import Answer, Answered, Inference, Rejected, moment
from serving.metrics import log
from serving.protocols import tensors
from serving.protocols.access import Access, Budget, model_ready
from serving.protocols.auth import TokenRole
from serving.routing import Routed

Handler = Callable[[Request], Awaitable[Response]]
_TOP = 10
_LARGE = 1 << 20
_SPECIFICATION = Path(__file__).resolve().parent / "openapi.json"
_PAGE = Path(__file__).resolve().parent / "page.html"


class HttpGate:
    """Refuses at the headers what would be refused anyway: bodies over the limit, predictions when the queue is full, and
    everything but the probes and the metrics when there are too many connections."""

    def __init__(self, inference: Inference, *, max_body: int, request_timeout_s: float) -> None:
        self._inference, self.max_body = inference, max_body
        self.request_timeout_s = request_timeout_s
        metrics = inference.metrics
        self._refused = {
            model: (metrics.shed.labels(model, "http"), metrics.requests.labels(model, "http", "503"))
            for model in ("", *inference.routed)
        }

    def refusal(
        self, method: bytes, url: bytes, headers: list[tuple[bytes, bytes]], *, crowded: bool
    ) -> tuple[int, str, float | None] | None:
        path = url.partition(b"?")[0]
        for name, value in headers:
            if name == b"content-length" and (not value.isdigit() or len(value) > 15 or int(value) > self.max_body):
                return 413, f"the body is larger than {self.max_body} bytes", None
        if method == b"POST":
            routed = self._asked(path)
            if routed is not None and routed.deployment is not None and routed.deployment.full:
                self._count(routed.model)
                return 503, "the server is full; try again later", routed.deployment.expected_wait_s()
        if crowded and not path.startswith(b"/v2/health/") and path != b"/metrics":
            self._count("")
            return 503, "the server has too many connections; try again later", 1.0
        return None

    def _asked(self, path: bytes) -> Routed | None:
        """Whom a prediction is asked of, where the path alone says so."""
        if path == b"/predict" and len(self._inference.routed) == 1:
            return next(iter(self._inference.routed.values()))
        if path.startswith(b"/v2/models/") and path.endswith(b"/infer"):
            return self._inference.routed.get(path[11:].partition(b"/")[0].decode("latin-1"))
        return None

    def _count(self, model: str) -> None:
        for counter in self._refused[model]:
            counter.inc()


class Http:
    """The routes of one server."""

    def __init__(
        self,
        inference: Inference,
        access: Access,
        *,
        max_body: int,
        status: Callable[[], dict[str, Any]],
        max_bytes: int = 512 << 20,
    ) -> None:
        self._inference, self._access, self._max_body, self._status = inference, access, max_body, status
        self._budget = Budget(max(max_bytes, max_body))

    def application(self) -> Starlette:
        """The ASGI application."""
        import swagger_ui_bundle

        open_ = functools.partial(self._route, needed=None)
        look = functools.partial(self._route, needed="viewer")
        ask = functools.partial(self._route, needed="predictor")
        model = "/v2/models/{model}"
        version = model + "/versions/{version}"
        vendor = Path(swagger_ui_bundle.__file__).parent / "vendor"
        (assets,) = sorted(vendor.glob("swagger-ui-*"))[-1:]
        application = Starlette(
            routes=[
                ask("/predict", self._predict, "POST"),
                ask(f"{model}/infer", self._infer, "POST"),
                ask(f"{version}/infer", self._infer, "POST"),
                open_("/v2/health/live", self._live),
                open_("/v2/health/ready", self._ready),
                open_(f"{model}/ready", self._model_ready),
                open_(f"{version}/ready", self._model_ready),
                look("/v2", self._server),
                look(model, self._model),
                look(version, self._model),
                look(f"{model}/config", self._configuration),
                look(f"{version}/config", self._configuration),
                look("/status", self._show_status),
                look("/metrics", self._metrics),
                open_("/", self._page),
                open_("/openapi.json", self._openapi),
                open_("/docs", self._docs),
                self._route("/admin/refresh", self._refresh, "POST", needed="admin"),
            ],
            exception_handlers={HTTPException: _http_exception, Exception: _server_error},
        )
        # Public files of a package, the same on every server: they need no token.
        application.router.redirect_slashes = False  # an answer, never a redirect to what the client says its host is
        application.mount("/docs/assets", StaticFiles(directory=assets))
        return application

    def _route(self, path: str, handler: Handler, method: str = "GET", *, needed: TokenRole | None) -> Route:
        async def endpoint(request: Request) -> Response:
            try:
                headers = request.headers
                if needed is not None:
                    self._access.check_proxy(headers)
                    self._access.check_origin(headers)
                    request.state.caller = self._access.check(headers.get("authorization"), needed)
                response = await handler(request)
            except Rejected as error:
                response = _error(error)
            except ClientDisconnect:
                response = Response(status_code=499)
            except Exception as error:
                response = _crashed(error)
            finally:
                self._budget.release(getattr(request.state, "held", 0))
            if method == "POST":
                model = request.path_params.get("model") or request.query_params.get("model") or ""
                known = model if model in self._inference.routed else "" if model else self._only_model
                self._inference.metrics.requests.labels(known, "http", str(response.status_code)).inc()
            return response

        return Route(path, endpoint, methods=[method])

    @property
    def _only_model(self) -> str:
        return next(iter(self._inference.routed)) if len(self._inference.routed) == 1 else ""

    async def _body(self, request: Request) -> bytes:
        """The whole body, bounded; the time it may take is bounded by the connection."""
        codings = ",".join(request.headers.getlist("content-encoding")).split(",")
        if not {"", "identity"}.issuperset(coding.strip().lower() for coding in codings):
            raise Rejected(415, "compressed bodies are not accepted; pictures are compressed already")
        chunks, size = [], 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > self._max_body:
                raise Rejected(413, f"the body is larger than {self._max_body} bytes")
            if not self._budget.take(len(chunk)):
                raise Rejected(503, "the server is full; try again later", retry_after_s=1.0)
            request.state.held = size
            chunks.append(chunk)
        return b"".join(chunks)

    async def _predict(self, request: Request) -> Response:
        kind = request.headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()
        # Which format a picture has, its bytes say.
        if not kind.startswith("image/") and kind not in ("application/octet-stream", "multipart/form-data"):
            raise Rejected(415, "send the picture as image/jpeg or its own type, as application/octet-stream or as a form")
        options = [name for name, _ in request.query_params.multi_items()]
        if len(set(options)) < len(options) or not {"model", "top"}.issuperset(options):
            raise Rejected(400, f"{', '.join(options)[:64]!r} in the address; valid are model and top, each once")
        top = request.query_params.get("top", str(_TOP))
        if not (top.isascii() and top.isdigit() and len(top) < 6) or int(top) < 1:
            raise Rejected(400, "top is a whole number from 1")
        event_at = moment(request.headers.get("x-event-time"))
        data = await self._body(request)
        if kind == "multipart/form-data":
            data = await _file_of(request, data)
        if not data:
            raise Rejected(400, "the picture is empty")
        answered = await self._inference.answer(
            request.query_params.get("model"),
            None,
            [(Form.ENCODED, data)],
            protocol="http",
            key=request.headers.get("idempotency-key", ""),
            caller=request.state.caller,
            event_at=event_at,
        )
        return _json(_shown(answered, answered.answers[0], int(top)))

    async def _infer(self, request: Request) -> Response:
        name, version = request.path_params["model"], request.path_params.get("version")
        deployment = self._inference.deployment(name, version)
        body = await self._body(request)
        header = request.headers.get("inference-header-content-length")
        if len(body) > _LARGE:
            asked, pictures = await asyncio.to_thread(_parse, deployment, body, header)
        else:
            asked, pictures = _parse(deployment, body, header)
        answered = await self._inference.answer(
            name,
            version,
            pictures,
            protocol="http-v2",
            key=request.headers.get("idempotency-key", ""),
            caller=request.state.caller,
            event_at=moment(request.headers.get("x-event-time")),
        )
        content, json_length = tensors.write_rest(asked, answered)
        if json_length is None:
            return Response(content, media_type="application/json")
        headers = {"inference-header-content-length": str(json_length)}
        return Response(content, media_type="application/octet-stream", headers=headers)

    async def _live(self, _: Request) -> Response:
        return _json({"live": True})

    async def _ready(self, _: Request) -> Response:
        ready = self._inference.ready
        return _json({"ready": ready}, status=200 if ready else 503)

    async def _model_ready(self, request: Request) -> Response:
        name = request.path_params["model"]
        ready = model_ready(self._inference, name, request.path_params.get("version"))
        return _json({"name": name, "ready": ready}, status=200 if ready else 503)

    async def _server(self, _: Request) -> Response:
        return _json({"name": "visionloop", "version": "", "extensions": tensors.EXTENSIONS})

    async def _model(self, request: Request) -> Response:
        deployment = self._inference.deployment(request.path_params["model"], request.path_params.get("version"))
        return _json(tensors.metadata(deployment))

    async def _configuration(self, request: Request) -> Response:
        deployment = self._inference.deployment(request.path_params["model"], request.path_params.get("version"))
        return _json(tensors.configuration(deployment))

    async def _show_status(self, _: Request) -> Response:
        return _json(self._status())

    async def _metrics(self, _: Request) -> Response:
        return Response(self._inference.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _openapi(self, _: Request) -> Response:
        return Response(_SPECIFICATION.read_bytes(), media_type="application/json")

    async def _page(self, request: Request) -> Response:
        """A page to drop a picture on; for who asks for JSON and no page, where to go."""
        accepted = request.headers.get("accept", "")
        if "application/json" in accepted and "text/html" not in accepted:
            places = {"predict": "/predict", "documentation": "/docs", "specification": "/openapi.json", "status": "/status"}
            return _json({"name": "visionloop", **places, "metrics": "/metrics"})
        page = _PAGE.read_text(encoding="utf-8")
        return HTMLResponse(page, headers={"content-security-policy": policy(page), "referrer-policy": "no-referrer"})

    async def _docs(self, _: Request) -> Response:
        return HTMLResponse(_DOCS)

    async def _refresh(self, _: Request) -> Response:
        await asyncio.gather(*(routed.refresh(patient=False) for routed in self._inference.routed.values()))
        return _json(self._status())


def policy(page: str) -> str:
    """The content security policy of a page that holds its own style and script: those two run, and nothing else."""
    told = {}
    for kind in ("style", "script"):
        text = page.partition(f"<{kind}>")[2].partition(f"</{kind}>")[0]
        told[kind] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    own = "; ".join(f"{kind}-src 'sha256-{digest}'" for kind, digest in told.items())
    return f"default-src 'none'; {own}; img-src blob: data:; connect-src 'self'; base-uri 'none'; frame-ancestors 'none'"


def _parse(deployment: Deployment, body: bytes, header: str | None) -> tuple[tensors.RestRequest, list[tuple[Form, bytes]]]:
    asked = tensors.read_rest(body, header, model=deployment.model, version=deployment.version)
    tensors.check_outputs(deployment, [name for name, _ in asked.outputs])
    return asked, tensors.pictures(deployment.release, asked.inputs)


def _shown(answered: Answered, answer: Answer, top: int) -> dict[str, Any]:
    classes = answered.deployment.release.engine.classes
    probabilities = answer.facts.probabilities[None]
    return {
        "prediction_id": answer.prediction_id,
        "label": answer.label,
        "unsure": answer.unsure,
        "predicted": answer.predicted,
        "confidence": answer.confidence,
        **{
            field.name: _listed(tensors.values_of(field, probabilities), field.shape, classes, top)
            for field in answered.deployment.task_outputs
        },
        "model": answered.deployment.model,
        "model_version": answered.version,
        "release": answered.deployment.digest,
    }


def _listed(values: tensors.Values, shape: tuple[int, ...], classes: Sequence[str], top: int) -> Any:
    """What one picture has of an output as JSON; numbers of the classes by their names, the `top` highest first."""
    if isinstance(values, list):
        return values[0].decode()
    (row,) = values
    if shape != (len(classes),):
        return row.tolist()
    return {classes[i]: row[i].item() for i in row.argsort()[::-1][:top]}


async def _file_of(request: Request, body: bytes) -> bytes:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        form = await MultiPartParser(request.headers, stream(), max_files=1, max_fields=8).parse()
    except (MultiPartException, KeyError, ValueError, AttributeError):
        raise Rejected(400, "not a multipart form with one file and at most 8 fields") from None
    try:
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        if len(files) != 1:
            raise Rejected(400, "the form holds no file; send the picture as a file")
        if len(form) > 1:
            raise Rejected(400, "the form holds more than the file; options are in the address: /predict?model=NAME&top=3")
        return await files[0].read()
    finally:
        await form.close()


def _json(content: Any, *, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status_code=status, media_type="application/json")


def _error(error: Rejected) -> Response:
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, round(error.retry_after_s)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(
        orjson.dumps({"error": error.message}), status_code=error.status, media_type="application/json", headers=headers
    )


async def _http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404 and request.url.path.startswith("/v2/"):
        has = ", ".join(tensors.EXTENSIONS)
        return _error(Rejected(404, f"this is not done by this server; it has inference, metadata, health, {has}"))
    words = {404: "there is nothing here; /docs lists the routes", 405: "this route has another method; /docs lists it"}
    response = _error(Rejected(error.status_code, words.get(error.status_code, "not accepted")))
    if error.status_code == 405:
        methods = (error.headers or {}).get("Allow", "GET, HEAD")  # files have no route of their own
        allowed = {"allow": ", ".join(sorted({*methods.replace(",", " ").split(), "OPTIONS"}))}
        if request.method == "OPTIONS":
            return Response(status_code=204, headers=allowed)
        response.headers.update(allowed)
    return response


async def _server_error(_: Request, error: Exception) -> Response:
    return _crashed(error)


def _crashed(error: Exception) -> Response:
    # Our own bug: the log has it, the client learns nothing about it but that.
    log("request crashed", level=logging.ERROR, problem=f"{type(error).__name__}: {error}")
    return _error(Rejected(503, "the server failed on this request; it was reported in its log", retry_after_s=1.0))


def routes_of(application: Starlette) -> set[tuple[str, str]]:
    """Method and path of every route, for the specification's test."""
    return {
        (method, route.path)
        for route in application.routes
        if isinstance(route, Route)
        for method in route.methods or ()
        if method != "HEAD"
    }


def specification() -> dict[str, Any]:
    """The OpenAPI document."""
    found: dict[str, Any] = json.loads(_SPECIFICATION.read_text())
    return found


_DOCS = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>visionloop serving</title>
<link rel="stylesheet" href="/docs/assets/swagger-ui.css"></head>
<body><div id="swagger-ui"></div>
<script src="/docs/assets/swagger-ui-bundle.js"></script>
<script>SwaggerUIBundle({url: "/openapi.json", dom_id: "#swagger-ui"})</script>
</body></html>
"""
