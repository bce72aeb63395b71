"""python -m flows is `visionloop`."""

from flows.cli import app

app()
