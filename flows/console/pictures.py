"""Pictures and drawings of a version's evidence, and the files of a run that its pages link to."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import APIRouter, Depends, Request
from fastapi.responses import FileResponse, Response

from components.contracts.errors import DataError, TamperedArtefact
from flows.console.application import Application
from flows.console.candidate import figure_names
from flows.console.guard import FIGURE_POLICY
from flows.console.visitors import Refused, application_of, viewer
from flows.pages import figures
from flows.training.registered import RegisteredEvidence, registered_evidence
from flows.workspace.versions import show

router = APIRouter(include_in_schema=False, dependencies=[Depends(viewer)])
_KEEP = {"cache-control": "private, max-age=86400"}
"""Of what an address names for good: evidence never changes."""
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
    erased = application.erased()
    if any(one.sha256 in erased and name in (one.thumbnail, one.saliency) for one in found.shown.pictures):
        raise Refused(410, "this picture was erased since, and is not shown any more")
    path = found.pictures / name
    if not path.is_file():
        raise DataError(f"{name} is not kept any more")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != files[name].sha256:
        raise TamperedArtefact(f"{name} is not the picture that the evidence names; it was changed since, and is not shown")
    return Response(data, media_type=kind, headers=_KEEP)


@router.get("/models/{model}/versions/{version}/figures/{name}.svg")
def drawing(request: Request, model: str, version: str, name: str) -> Response:
    """One of the drawings; made once, and kept beside the evidence."""
    application = application_of(request)
    found = _evidence(application, model, version)
    if name not in dict(figure_names(found)):
        raise Refused(404, "there is no drawing of that name of this version")
    path = found.folder / "figures" / f"{name}-{_drawn_by()}.svg"
    if not path.is_file():
        summary = show(application.desk(model), version).state.requested.body.get("summary") or {}
        with application.drawing:
            svg = _draw(found, name, summary.get("headline", "accuracy"))
        path.parent.mkdir(exist_ok=True)
        scratch = path.with_suffix(".tmp")
        scratch.write_text(svg)
        scratch.replace(path)
    return Response(
        path.read_bytes(),
        media_type="image/svg+xml",
        headers={**_KEEP, "content-security-policy": FIGURE_POLICY},
    )


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


@router.get("/runs/{run}/{name:path}")
def file_of_run(request: Request, run: str, name: str) -> Response:
    """The report of a run, or a file of its data docs."""
    application = application_of(request)
    folder = application.workspace.runs / run
    path = folder / name
    kind = _IN_A_RUN.get(path.suffix.lower())
    allowed = name == "report.html" or "/data_docs/" in f"/{name}"
    # A run folder links into the store, so that what a name leads to is looked at by the name, not by where it ends.
    if ".." in Path(name).parts or "/" in run or run in ("", ".", "..") or not allowed or kind is None or not path.is_file():
        raise Refused(404, "there is no such page of a run")
    origin = f"{request.url.scheme}://{request.headers['host']}"
    policy = {"content-security-policy": _PAGE_OF_A_RUN.format(origin=origin)}
    return FileResponse(path, media_type=kind, headers=policy)
