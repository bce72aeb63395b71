"""MLflow's own `models serve`: a pyfunc that takes base64 in its JSON, for that is what the server speaks."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import mlflow

SETTINGS = {
    "1 worker, 2 threads": {"workers": 1, "threads": 2},
    "2 workers, 1 thread each": {"workers": 2, "threads": 1},
}
_MODEL = """
import base64, os
from pathlib import Path
import mlflow
from bench.peers.answering import Answering

class Peer(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        self.engine = Answering(Path(os.environ["PEER_RELEASE"]), num_threads=int(os.environ["PEER_THREADS"]))

    def predict(self, context, model_input, params=None):
        pixels = [self.engine.pixels(base64.b64decode(image)) for image in model_input["image"]]
        return self.engine.batch(pixels)

mlflow.models.set_model(Peer())
"""


if __name__ == "__main__":
    release, port, name = sys.argv[1:]
    os.environ["PEER_RELEASE"], os.environ["PEER_THREADS"] = release, str(SETTINGS[name]["threads"])
    with tempfile.TemporaryDirectory() as scratch:
        script = Path(scratch) / "peer_model.py"
        script.write_text(_MODEL)
        model = Path(scratch) / "model"
        mlflow.pyfunc.save_model(model, python_model=str(script), pip_requirements=[])
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "models",
            "serve",
            "-m",
            str(model),
            "--port",
            port,
            "--env-manager",
            "local",
        ]
        sys.exit(subprocess.call([*command, "--workers", str(SETTINGS[name]["workers"]), "--host", "127.0.0.1"]))
