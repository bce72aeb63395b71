"""Torch module -> ONNX file: the one interchange graph that engines and encoders are built from.

And torch module -> exported program of torch, for converters that read no ONNX.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from components.contracts.errors import ExportError
from components.contracts.models import Preprocessing

if TYPE_CHECKING:
    import torch
    from torch import nn

OPSET = 20


def to_onnx(model: nn.Module, preprocessing: Preprocessing, path: Path) -> None:
    """Write `model` (uint8 NHWC to logits, embedding) as one self-contained file with a dynamic batch.

    Raises ExportError when torch cannot trace it or onnx refuses the result.
    """
    import onnx
    import torch

    shape = (2, preprocessing.height, preprocessing.width, preprocessing.channels)
    example = torch.zeros(shape, dtype=torch.uint8)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            # torch's exporter warns about its own internals.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                (example,),
                str(path),
                input_names=["images"],
                output_names=["logits", "embedding"],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        graph = onnx.load(path)
        # Every target that builds from the graph can carry on what its pictures have to be.
        onnx.helper.set_model_props(graph, {"visionloop.preprocessing": preprocessing.digest()})
        onnx.save(graph, path)
        onnx.checker.check_model(str(path))
    except Exception as error:
        raise ExportError(f"torch could not export this model to ONNX: {_told(error)}") from error


def to_program(model: nn.Module, example: torch.Tensor, path: Path) -> None:
    """Write `model` as torch's own exported program, which another interpreter with the same torch opens without our code.

    Its input has the shape and kind of `example`. Raises ExportError when torch cannot trace the model.
    """
    import torch

    try:
        with torch.no_grad(), warnings.catch_warnings():
            # torch's exporter warns about its own internals.
            warnings.simplefilter("ignore")
            torch.export.save(torch.export.export(model, (example,)), path)
    except Exception as error:
        raise ExportError(f"torch could not export this model: {_told(error)}") from error


def _told(error: BaseException) -> str:
    """In a line what was wrong, such as the operator that ONNX does not have.

    Exporter errors share no base class; the outermost tells of the exporter's steps, the innermost what was wrong.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0]
