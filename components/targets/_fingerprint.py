"""The fingerprint of the preprocessing inside an engine's own file, where a format has room for it.

An engine's record says how pictures are prepared for it. A file that was put beside another record gives answers all the
same, wrong ones; what it says of itself is compared by everyone who loads it. Older files say nothing.
"""

from __future__ import annotations

from components.contracts.errors import EngineUnavailable
from components.contracts.models import Engine

PROPERTY = ("visionloop", "preprocessing")
"""Where OpenVINO's runtime information has it; ONNX has the same with a dot, among its metadata."""


def expect(engine: Engine, told: str | None) -> None:
    """Raise EngineUnavailable where the file tells another preprocessing than the engine's record."""
    expected = engine.preprocessing.digest()
    if told and told != expected:
        raise EngineUnavailable(
            f"the file of engine {engine.name} was built for pictures that are prepared otherwise (fingerprint {told[:12]}) "
            f"than its record says ({expected[:12]}): they do not belong together; build the engine anew"
        )
