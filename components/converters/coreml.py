"""A program of torch -> an ML Program, by coremltools; runs in the environment `coreml`.

Nothing but Apple's systems executes it. What is read back from the written package is compared with the checkpoint instead:
inputs and outputs, scaling, weights, class labels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from components.converters.answering import answer

_DATE = "com.github.apple.coremltools.conversion_date"


def convert(request: dict[str, Any]) -> dict[str, Any]:
    """Write the package `out`: an image of `shape` (1, c, h, w) to `logits` and `embedding`; raises ValueError."""
    import coremltools
    import numpy as np
    import torch

    program = torch.export.load(request["program"]).run_decompositions({})
    half = request["precision"] == "fp16"
    layout = coremltools.colorlayout
    passes = coremltools.PassPipeline.DEFAULT
    # A scale that is learned after a convolution stays a step of its own: so every weight can be found again.
    passes.remove_passes({"common::fuse_conv_scale"})
    model = coremltools.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=getattr(coremltools.target, f"iOS{request['minimum_ios']}"),
        pass_pipeline=passes,
        compute_precision=coremltools.precision.FLOAT16 if half else coremltools.precision.FLOAT32,
        # The one kind of input whose values are uint8; its scale is 1 and its bias 0, for scaling is the program's.
        inputs=[
            coremltools.ImageType(
                name="images",
                shape=tuple(request["shape"]),
                color_layout=layout.RGB if _coloured(request) else layout.GRAYSCALE,
            )
        ],
        outputs=[coremltools.TensorType(name=name, dtype=np.float32) for name in ("logits", "embedding")],
    )
    # The day of the conversion would make every package another one.
    model.user_defined_metadata.pop(_DATE, None)
    model.user_defined_metadata["classes"] = json.dumps(request["classes"])
    model.user_defined_metadata["preprocessing"] = json.dumps(request["preprocessing"])
    package = Path(request["out"])
    model.save(str(package))
    # It is for ExecuTorch's debugger; the package's own manifest does not know it.
    (package / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)
    return {"runtime": f"coremltools {coremltools.__version__}", "facts": proof(package, program, request)}


def _coloured(request: dict[str, Any]) -> bool:
    return bool(request["shape"][1] == 3)


def proof(package: Path, program: Any, request: dict[str, Any]) -> dict[str, int | float]:
    """What a package holds, as it lies on the disk, against the checkpoint; raises ValueError where they differ."""
    import coremltools
    import numpy as np
    from coremltools.converters.mil.frontend.milproto.load import load
    from safetensors.numpy import load_file

    from components.converters.weights import Expected, Forms, compare, expected, in_place

    spec = coremltools.utils.load_spec(str(package))
    differs(told(spec), wanted(request))
    loaded = load(spec, spec.specificationVersion, str(package / "Data" / "com.apple.CoreML" / "weights"))
    outputs = dict(zip(("logits", "embedding"), program.graph_signature.user_outputs, strict=True))
    held = [(outputs.get(name, name), value) for op in loaded.functions["main"].operations for name, value in taken(op)]
    kind = np.float16 if request["precision"] == "fp16" else np.float32
    mean, std = (np.array(request["preprocessing"][name], np.float32) * np.float32(255) for name in ("mean", "std"))
    # A step that changes nothing is left out of a program.
    means: Forms = ((mean,),) if mean.any() else ((mean,), ())
    stds: Forms = ((std,), (1 / std,)) if (std != 1).any() else ((std,), ())
    compare([Expected(("mean of the preprocessing",), means), Expected(("std of the preprocessing",), stds)], held, kind)
    tensors = expected(program, load_file(request["weights"]), request["prefix"])
    worst = compare(tensors, held, kind)
    return {
        "weights_compared": sum(len(one.names) for one in tensors),
        "weights_in_place": in_place(tensors, held),
        "weights_max_difference": worst,
    }


def taken(operation: Any) -> list[tuple[str, Any]]:
    """The float constants that an operation of a program takes, each with the operation's name in the program of torch."""
    import numpy as np

    if operation.op_type == "const":
        return []
    name = operation.outputs[0].name.removesuffix("_cast_fp16")
    given = [
        each for value in operation.inputs.values() for each in (value if isinstance(value, (list, tuple)) else [value])
    ]
    arrays = [np.asarray(each.val) for each in given if each is not None and each.val is not None]
    return [(name, array) for array in arrays if array.dtype.kind == "f"]


def wanted(request: dict[str, Any]) -> dict[str, Any]:
    """What a package must say of itself."""
    _, _, height, width = request["shape"]
    return {
        "input images": ("RGB" if _coloured(request) else "GRAYSCALE", height, width),
        "output logits": ("FLOAT32", 1, len(request["classes"])),
        "output embedding": ("FLOAT32", 1, request["embedding_dim"]),
        "classes": request["classes"],
        "preprocessing": request["preprocessing"],
    }


def told(spec: Any) -> dict[str, Any]:
    """What a package says of itself."""
    found: dict[str, Any] = {}
    for given in spec.description.input:
        image = given.type.imageType
        space = image.ColorSpace.Name(image.colorSpace) if given.type.WhichOneof("Type") == "imageType" else "no image"
        found[f"input {given.name}"] = (space, image.height, image.width)
    for given in spec.description.output:
        array = given.type.multiArrayType
        found[f"output {given.name}"] = (array.ArrayDataType.Name(array.dataType), *array.shape)
    described = spec.description.metadata.userDefined
    return found | {name: json.loads(described[name]) for name in ("classes", "preprocessing") if name in described}


def differs(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise ValueError where a package says something else of itself than what is expected."""
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise ValueError(f"its {name} is {found.get(name, 'missing')}, expected {expected.get(name, 'no such thing')}")


if __name__ == "__main__":
    answer(convert)
