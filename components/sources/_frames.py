"""Samples the frames of one video file; run as a program of its own, since OpenCV parses untrusted bytes in native code.

`python _frames.py REQUEST ANSWER`, two files of JSON. Nothing of visionloop is imported; memory, time and the sizes of files
are bounded by the system before the video is opened.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

_SIDE = 32
"""Of the small grey picture by which two frames are compared."""


def _bound(request: dict[str, Any]) -> None:
    for limit, most in (
        (resource.RLIMIT_AS, request["max_memory_mb"] << 20),
        (resource.RLIMIT_CPU, request["max_seconds"]),
        (resource.RLIMIT_FSIZE, request["max_file_mb"] << 20),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (most, most))


def _sampled(request: dict[str, Any]) -> dict[str, Any]:
    import cv2
    import numpy as np

    cv2.setNumThreads(1)
    film = cv2.VideoCapture(request["path"], cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    if not film.isOpened():
        return {"wrong": "it cannot be opened: damaged, cut short, or no video of a kind that is known"}
    claimed, rate = film.get(cv2.CAP_PROP_FRAME_COUNT), film.get(cv2.CAP_PROP_FPS)
    frames: list[tuple[int, float]] = []
    before: Any = None
    number, seconds = 0, 0.0
    while film.grab():
        seconds = film.get(cv2.CAP_PROP_POS_MSEC) / 1000
        if not seconds > 0 and rate > 0:
            seconds = number / rate
        number += 1
        if frames and seconds - frames[-1][1] < request["every_seconds"] - 1e-6:
            continue
        ok, frame = film.retrieve()
        if not ok:
            continue
        height, width = frame.shape[:2]
        if width * height > request["max_pixels"]:
            return {"wrong": f"its frames have {width}x{height} pixels, taken are up to {request['max_pixels']}"}
        small = cv2.resize(cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY), (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
        small = small.astype(np.float32) / 255
        if before is not None and float(np.abs(small - before).mean()) < request["min_change"]:
            continue
        if len(frames) == request["max_frames"]:
            most = request["max_frames"]
            return {"wrong": f"it gives more than {most} frames; take fewer by every_seconds or raise max_frames"}
        before = small
        frames.append((number - 1, seconds))
        if not cv2.imwrite(str(Path(request["out"], f"{number - 1:07d}.png")), frame):
            return {"wrong": "a frame could not be written; look for a full disk"}
    lasts = claimed / rate if claimed > 0 and rate > 0 else 0.0
    return {"frames": frames, "ends_at": seconds + (1 / rate if rate > 0 else 0.0), "lasts": lasts}


def main(request: Path, answer: Path) -> None:
    """Answer a request."""
    asked = json.loads(request.read_text(encoding="utf-8"))
    _bound(asked)
    answer.write_text(json.dumps(_sampled(asked)), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
