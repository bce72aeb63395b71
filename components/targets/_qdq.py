"""ONNX graphs in lower precision: Q/DQ pairs for int8, float16, both with uint8 images in and float32 answers out.

The same Q/DQ graph serves ONNX Runtime, which fuses pairs and layer to one integer operation, and TensorRT, which does so
for symmetric ranges of signed integers and a float bias alone. Ranges and pairs are ONNX Runtime's: of what NNCF writes as
ONNX it runs a quarter of the layers of EfficientNet-Lite0 in integers, and takes longer for it than for float.
"""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from components.targets._quantisation import Executed

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_MOVING = ("Clip", "Flatten", "LeakyRelu", "MaxPool", "Relu", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Operations of one input that are carried out on integers, between layers that are."""
_QUANTISED = (*_LAYERS, *_MOVING, "Add", "AveragePool", "Concat", "GlobalAveragePool", "ReduceMean", "Resize", "Split")
_IN_INT8 = (
    "ConvInteger",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "QGemm",
    "QLinearConv",
    "QLinearMatMul",
)
_BATCH = 32


def float16(graph: Path) -> Any:
    """A graph's model in float16."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    return convert_float_to_float16(onnx.load(graph), keep_io_types=True)


class QdqQuantiser:
    """A graph whose layers are in int8 but for some; every model is one of ONNX."""

    def __init__(self, graph: Path, images: npt.NDArray[np.uint8], *, for_tensorrt: bool, scratch: Path) -> None:
        import onnx
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        self._for_tensorrt, self._scratch = for_tensorrt, scratch
        of_tensorrt = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            prepared, quantised = Path(folder, "prepared.onnx"), Path(folder, "quantised.onnx")
            quant_pre_process(str(graph), str(prepared), skip_symbolic_shape=True)
            quantize_static(
                str(prepared),
                str(quantised),
                _Reader(images),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(_QUANTISED),
                per_channel=True,
                # Signed and unsigned: ONNX Runtime on x86 has integer convolutions for unsigned activations alone.
                activation_type=QuantType.QInt8 if for_tensorrt else QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                extra_options=of_tensorrt if for_tensorrt else {},
            )
            self._float, self._int8 = onnx.load(prepared), onnx.load(quantised)
        self._made_in_float = {output: node for node in self._float.graph.node for output in node.output}
        self._stored = {tensor.name: tensor for tensor in self._float.graph.initializer}
        self._keep_outputs_in_float()
        self._layers = {node.name: node for node in self._float.graph.node if node.op_type in _LAYERS}

    def in_float(self) -> Any:
        return self._float

    def quantised(self, kept: Sequence[str]) -> Any:
        model = type(self._int8)()
        model.CopyFrom(self._int8)
        made = {output: node for node in model.graph.node for output in node.output}
        for node in list(model.graph.node):
            if node.name in kept:
                for index, name in enumerate(self._layers[node.name].input):
                    if name in self._stored:
                        node.input[index] = self._restored(model, name)
                    else:
                        self._go_past_pairs(model, made, node, index)
        _remove_unused(model)
        return model

    def layers(self, model: Any) -> list[str]:
        made = {output: node.op_type for node in model.graph.node for output in node.output}
        return [
            node.name
            for node in model.graph.node
            if node.name in self._layers and all(made.get(name) == "DequantizeLinear" for name in node.input[:2])
        ]

    def without(self, model: Any, layer: str) -> Any:
        return self.quantised([layer])

    def logits(self, model: Any, images: npt.NDArray[np.uint8]) -> Iterator[npt.NDArray[np.float32]]:
        session = _opened(model)
        for start in range(0, len(images), _BATCH):
            yield session.run(["logits"], {"images": images[start : start + _BATCH]})[0]

    def compute(self, model: Any) -> list[Executed]:
        """By the graph that ONNX Runtime executes; TensorRT's is seen where a GPU is, so by pairs around layers for that."""
        if self._for_tensorrt:
            in_int8 = set(self.layers(model))
        else:
            in_int8 = _executed_in_int8(model, self._scratch)
        return [Executed(name, amount, name in in_int8) for name, amount in self._multiplications.items()]

    def _keep_outputs_in_float(self) -> None:
        """Answers of 256 steps would tie; what is computed from them inside goes on from integers."""
        model = self._int8
        made = {output: node for node in model.graph.node for output in node.output}
        for output in model.graph.output:
            last = made[output.name]
            if last.op_type != "DequantizeLinear":
                continue
            exact = self._before(model, made, made[last.input[0]])
            renamed = {output.name: f"{output.name}.dequantised", exact: output.name}
            for node in model.graph.node:
                for names in (node.input, node.output):
                    names[:] = [renamed.get(name, name) for name in names]
        _remove_unused(model)

    def _go_past_pairs(self, model: Any, made: dict[str, Any], node: Any, index: int) -> None:
        """Let a layer see the numbers before they were rounded, also those that only moved since."""
        while True:
            source = made.get(node.input[index])
            if source is not None and source.op_type == "DequantizeLinear" and source.input[0] in made:
                node.input[index] = self._before(model, made, made[source.input[0]])
                source = made.get(node.input[index])
            if source is None or source.op_type not in _MOVING:
                return
            node, index = source, 0

    def _before(self, model: Any, made: dict[str, Any], rounding: Any) -> str:
        """The numbers that a pair rounds, behind the activation that its range has taken the place of."""
        given = rounding.input[0]
        activation = self._made_in_float.get(given.removesuffix("_QuantizeLinear_Input"))
        if activation is None or activation.op_type not in ("Clip", "Relu") or made[given].op_type == activation.op_type:
            return str(given)
        original = made.get(activation.output[0])
        if original is not None and original.op_type == activation.op_type:
            return str(activation.output[0])
        restored = f"{activation.output[0]}.float"
        if restored not in made:
            node = type(activation)()
            node.CopyFrom(activation)
            node.name = f"{restored}.{rounding.name}"
            node.input[:] = [given, *(self._restored(model, name) for name in activation.input[1:])]
            node.output[:] = [restored]
            model.graph.node.insert([each.name for each in model.graph.node].index(rounding.name), node)
            made[restored] = node
        return restored

    def _restored(self, model: Any, name: str) -> str:
        """A stored tensor as it was before quantisation, in a model that may have one of its name."""
        restored = f"{name}.float"
        if name and all(tensor.name != restored for tensor in model.graph.initializer):
            tensor = model.graph.initializer.add()
            tensor.CopyFrom(self._stored[name])
            tensor.name = restored
        return restored if name else ""

    @functools.cached_property
    def _multiplications(self) -> dict[str, float]:
        import onnx

        single = type(self._float)()
        single.CopyFrom(self._float)
        single.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
        del single.graph.value_info[:]
        inferred = onnx.shape_inference.infer_shapes(single, data_prop=True).graph
        shapes = {
            value.name: [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
            for value in (*inferred.value_info, *inferred.output, *inferred.input)
        }
        shapes |= {tensor.name: list(tensor.dims) for tensor in inferred.initializer}
        found: dict[str, float] = {}
        for name, node in self._layers.items():
            given, other, made = (shapes.get(key, [1]) for key in (*node.input[:2], node.output[0]))
            # A convolution multiplies each output by the weights of its channel, a transposed one each input by those of
            # its, a product of matrices by a row of the first.
            if node.op_type == "Conv":
                amount = np.prod(made) * np.prod(other) / other[0]
            elif node.op_type == "ConvTranspose":
                amount = np.prod(given) * np.prod(other) / other[0]
            else:
                amount = np.prod(made) * given[-1]
            found[name] = float(amount)
        return found


class _Reader:
    """Calibration images as ONNX Runtime asks for them."""

    def __init__(self, images: npt.NDArray[np.uint8]) -> None:
        self._batches = iter([images[start : start + _BATCH] for start in range(0, len(images), _BATCH)])

    def get_next(self) -> dict[str, npt.NDArray[np.uint8]] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch}


def _opened(model: Any, *, written_to: Path | None = None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if written_to:
        options.optimized_model_filepath = str(written_to)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _executed_in_int8(model: Any, scratch: Path) -> set[str]:
    """Names of the layers that ONNX Runtime makes integer operations of."""
    import onnx

    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        path = Path(folder, "executed.onnx")
        _opened(model, written_to=path)
        nodes = onnx.load(path).graph.node
    # A layer that was moved to another layout has its name and a number.
    return {re.sub(r"_token_\d+$", "", node.name) for node in nodes if node.op_type in _IN_INT8}


def _remove_unused(model: Any) -> None:
    wanted = {output.name for output in model.graph.output}
    kept = []
    for node in reversed(model.graph.node):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(kept))
    stored = [tensor for tensor in model.graph.initializer if tensor.name in wanted]
    del model.graph.initializer[:]
    model.graph.initializer.extend(stored)
