"""Pictures and drawings of a version's evidence, and the files of a run that its pages link to."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from fastapi import APIRouter, Depends, Request
from fastapi.responses import FileResponse, Response

from components.contracts.errors import DataError, TamperedArtefact
from components.store import write_atomically
from flows.console.application import Application
from flows.console.candidate import DATA_DOCS, docs_key, figure_names, is_erased
from flows.console.guard import FIGURE_POLICY
from flows.console.visitors import NotSignedIn, Refused, application_of, viewer
from flows.pages import figures
from flows.training.registered import RegisteredEvidence, registered_evidence
from flows.training.run import stage_folder
from flows.workspace.versions import show

router = APIRouter(include_in_schema=False, dependencies=[Depends(viewer)])
open_router = APIRouter(include_in_schema=False)
"""Of what a key in the address lets in."""
_ASK_AGAIN = {"cache-control": "private, no-cache"}
"""A picture may be erased; where it is still what it was, asking again costs no bytes."""
_PICTURES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
_IN_A_RUN = {
    **_PICTURES,
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
}
_PAGE_OF_A_RUN = "sandbox allow-scripts allow-popups; default-src {origin} 'unsafe-inline' data:; form-action 'none'"
"""Pages that libraries wrote run scripts of theirs: in a sandbox, where they know no cookie and cannot ask us anything."""


def _evidence(application: Application, model: str, version: str) -> RegisteredEvidence:
    desk = application.desk(model)
    return registered_evidence(desk, show(desk, version).state)


@router.get("/models/{model}/versions/{version}/pictures/{name:path}")
def picture(request: Request, model: str, version: str, name: str) -> Response:
    """A picture of the evidence, by its name in the record, with the digest that it has there."""
    application = application_of(request)
    found = _evidence(application, model, version)
    files = {file.name: file for file in found.shown.files} if found.shown else {}
    kind = _PICTURES.get(Path(name).suffix.lower())
    if name not in files or kind is None or found.shown is None:
        raise Refused(404, "the evidence of this version has no picture of that name")
    if is_erased(name, application.erased()):
        raise Refused(410, "this picture was erased since, and is not shown any more")
    path = found.pictures / name
    if not path.is_file():
        raise DataError(f"{name} is not kept any more")
    data, digest = path.read_bytes(), files[name].sha256
    if hashlib.sha256(data).hexdigest() != digest:
        raise TamperedArtefact(f"{name} is not the picture that the evidence names; it was changed since, and is not shown")
    return _answer(request, data, kind, digest)


def _answer(request: Request, data: bytes, kind: str, digest: str, **headers: str) -> Response:
    """The bytes, unless the browser has them already."""
    tagged = {**_ASK_AGAIN, "etag": f'"{digest}"', **headers}
    if request.headers.get("if-none-match") == tagged["etag"]:
        return Response(status_code=304, headers=tagged)
    return Response(data, media_type=kind, headers=tagged)


@router.get("/models/{model}/versions/{version}/figures/{name}.svg")
def drawing(request: Request, model: str, version: str, name: str) -> Response:
    """One of the drawings; made once, and kept beside the evidence."""
    application = application_of(request)
    found = _evidence(application, model, version)
    if name not in dict(figure_names(found)):
        raise Refused(404, "there is no drawing of that name of this version")
    path = found.folder / "figures" / f"{name}-{_drawn_by()}.svg"
    with application.drawing:
        if not path.is_file():
            summary = show(application.desk(model), version).state.requested.body.get("summary") or {}
            svg = _draw(found, name, summary.get("headline", "accuracy"))
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, svg.encode())
    data, policy = path.read_bytes(), {"content-security-policy": FIGURE_POLICY}
    return _answer(request, data, "image/svg+xml", hashlib.sha256(data).hexdigest(), **policy)


def _drawn_by() -> str:
    """Names the code that draws: another one draws anew."""
    return hashlib.sha256(Path(figures.__file__).read_bytes()).hexdigest()[:12]


def _draw(found: RegisteredEvidence, name: str, headline: str) -> str:
    figures.prepare_figures()
    if name == "engines":
        return figures.engine_figure(found.evaluations, headline)
    if name == "pareto":
        by_engine = {stored.record.engine: stored for stored in found.measurements}
        both = [
            (stored, by_engine[stored.record.engine]) for stored in found.evaluations if stored.record.engine in by_engine
        ]
        evaluations, measurements = zip(*both, strict=True)
        return figures.pareto_figure(evaluations, measurements, headline, found.verdict.serving_engine)
    if name == "curves":
        return figures.curves_figure(found.history, headline)
    if name == "risk_coverage":
        assert found.risk_coverage is not None  # `figure_names` lists it only then
        return figures.risk_coverage_figure(found.risk_coverage)
    of_serving = {"confusion": figures.confusion_figure, "reliability": figures.reliability_figure}
    return of_serving[name](found.serving)


@router.get("/runs/{run}/report.html")
def report_of_run(request: Request, run: str) -> Response:
    """The report of a run, unless it shows a picture that was erased since."""
    application = application_of(request)
    folder = _run(application, run)
    erased = application.erased()
    if any(is_erased(path.name, erased) for path in folder.glob(f"{stage_folder('evidence')}/pictures/*")):
        raise Refused(410, "this report shows a picture that was erased since; the version's page shows the others")
    return _file(request, folder / "report.html")


@open_router.get("/runs/{run}/data-docs/{key}/{name:path}")
def data_docs(request: Request, run: str, key: str, name: str) -> Response:
    """A file of a run's data docs; the key in its address lets in whoever was shown it.

    These pages are in a sandbox, from which a browser sends no cookie along, not even for a picture of theirs.
    """
    application = application_of(request)
    if not hmac.compare_digest(key.encode(), docs_key(application, run).encode()):
        raise NotSignedIn
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise Refused(404, "there is no such page of a run")
    response = _file(request, _run(application, run) / stage_folder("validation") / DATA_DOCS / name)
    response.headers["cross-origin-resource-policy"] = "cross-origin"
    return response


def _run(application: Application, run: str) -> Path:
    if run not in {path.name for path in application.workspace.runs.iterdir()}:
        raise Refused(404, "there is no such run")
    return application.workspace.runs / run


def _file(request: Request, path: Path) -> Response:
    kind = _IN_A_RUN.get(path.suffix.lower())
    if kind is None or not path.is_file():
        raise Refused(404, "there is no such page of a run")
    origin = f"{request.url.scheme}://{request.headers['host']}"
    policy = {"content-security-policy": _PAGE_OF_A_RUN.format(origin=origin)}
    return FileResponse(path, media_type=kind, headers=policy)
