"""Torch module -> ONNX file: the one interchange graph that engines and encoders are built from."""

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
        onnx.checker.check_model(str(path))
    except Exception as error:
        # Exporter errors share no base class. The outermost tells of the exporter's steps, the innermost what was wrong,
        # such as the operator that ONNX does not have.
        innermost: BaseException = error
        while innermost.__cause__ is not None:
            innermost = innermost.__cause__
        told = (str(innermost).splitlines() or [type(innermost).__name__])[0]
        raise ExportError(f"torch could not export this model to ONNX: {told}") from error
