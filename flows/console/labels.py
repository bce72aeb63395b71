"""Labels by keyboard: the pictures whose labels would teach most, a screenful at a time."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import RedirectResponse, Response

from flows.console.rendering import page
from flows.console.visitors import AnyVisitor, Posted, Viewer, application_of, expect_role, viewer
from flows.loop.labelling import choices, count_asked, give_labels, picture, to_label
from flows.pages.thumbnails import media_type

router = APIRouter(include_in_schema=False)
_SHOWN = 24
_KEYS = "1234567890abcdefghijklmnopqrstuvwxyz"
"""One for each class; where there are more classes, a name is typed."""
_FIELD = "label:"
_SIDE = 512
"""Most pixels of a side of a picture that is shown."""


@router.get("/models/{model}/labels")
def labels_page(
    request: Request, visitor: Viewer, model: str, taken: Annotated[int | None, Query(ge=0, le=10_000)] = None
) -> Response:
    """What to label next; a picture whose bytes are not kept cannot be."""
    loop = application_of(request).loop(model)
    asked = [each for each in to_label(loop) if each.kept]
    classes = choices(loop) if asked else ()
    return page(
        request,
        visitor,
        "labels.html",
        model=model,
        pictures=asked[:_SHOWN],
        num_asked=count_asked(loop).num_pictures,
        classes=classes,
        keys=_keys(classes),
        taken=taken,
        request_id=secrets.token_urlsafe(16),
        field=_FIELD,
    )


def _keys(classes: Sequence[str]) -> list[tuple[str, str]]:
    """The key of each class: its name where all names are one character, such as digits; none where keys do not suffice."""
    lower = [name.lower() for name in classes]
    if all(len(name) == 1 and name in _KEYS for name in lower) and len(set(lower)) == len(lower):
        return list(zip(lower, classes, strict=True))
    return list(zip(_KEYS, classes, strict=False)) if len(classes) <= len(_KEYS) else []


@router.post("/models/{model}/labels")
def label(request: Request, visitor: AnyVisitor, fields: Posted, model: str) -> Any:
    """Take the labels that were given, through the same import as a file."""
    expect_role(visitor, "trainer", "labelling")
    loop = application_of(request).loop(model)
    given = [(name.removeprefix(_FIELD), value) for name, value in fields.items() if name.startswith(_FIELD) and value]
    address = f"/models/{model}/labels"
    if not given:
        return RedirectResponse(f"{address}?taken=0", status_code=303)
    by = visitor.principal(fields.get("name", "")).name
    found = give_labels(loop, given, by=by, request=fields.get("request", ""))
    return RedirectResponse(f"{address}?taken={found.imported.new}", status_code=303)


@router.get("/models/{model}/captures/{sha256}", dependencies=[Depends(viewer)])
def capture(request: Request, model: str, sha256: str) -> Response:
    """A picture of production, drawn anew from its pixels: what somebody sent is never handed on as it came."""
    loop = application_of(request).loop(model)
    data = picture(loop, sha256, side=_SIDE)
    return Response(data, media_type=media_type(data), headers={"cache-control": "private, no-cache"})
