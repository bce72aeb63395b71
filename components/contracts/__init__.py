"""What the parts of visionloop agree on. Nothing is re-exported: an edit re-keys only the stages that use it."""

import importlib
from typing import Any

_HOMES = ("errors", "records", "wording", "data", "models", "releases", "verdicts", "progress", "families")


def __getattr__(name: str) -> Any:
    """A workspace's plug-in may import from here what stood here before the contracts had rooms of their own."""
    if name in _HOMES:
        return importlib.import_module(f"{__name__}.{name}")
    for home in (*(f"{__name__}.{module}" for module in _HOMES), "monitoring.verdicts"):
        if not name.startswith("_") and hasattr(module := importlib.import_module(home), name):
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
