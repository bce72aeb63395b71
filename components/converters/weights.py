"""What a converted file must hold of a checkpoint's weights, and whether it does: proof for a runtime that is not here.

A batch normalisation that follows a convolution may be folded into it: then the folded weights are computed here anew. Files
name their operations as the program does, so that each tensor is looked for where its own layer takes it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]
Forms = tuple[tuple[Array, ...], ...]
Held = Sequence[tuple[str, Array]]
"""What a file holds: the name of the operation that takes it, and the array."""
_TOLERANCES: dict[type, float] = {np.float32: 1e-5, np.float16: 1e-3}
"""Of a tensor's largest value. Unfolded ones are equal; folding rounds anew, and fp16 keeps 11 bits."""


@dataclass(frozen=True)
class Expected:
    """Tensors that belong together, and what a file may hold for them: all arrays of one of the forms."""

    names: tuple[str, ...]
    forms: Forms
    operations: tuple[str, ...] = ()
    """What takes them, as the program names it; empty where that may be anything."""


def expected(program: torch.export.ExportedProgram, weights: Mapping[str, Array], prefix: str) -> list[Expected]:
    """What a file made of `program` must hold of `weights`, whose names the program has with `prefix` before them.

    Raises ValueError when the program uses a tensor that is not among the weights.
    """
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    used = {
        node.name: names[node.name].removeprefix(prefix)
        for node in program.graph.nodes
        if node.name in names and node.users and names[node.name] not in signature.non_persistent_buffers
    }
    unknown = sorted(set(used.values()) - set(weights))
    if unknown:
        raise ValueError(f"the program uses {unknown[0]}, which the checkpoint does not hold")
    found: list[Expected] = []
    folded: set[str] = set()
    for node in program.graph.nodes:
        given = _folding(node, used)
        if given is not None:
            convolution, normalisation = given
            takes = (node.args[0].name, node.name)
            found.append(_folded(convolution, normalisation, node.args[-1], weights, takes))
            folded.update(found[-1].names)
    takers: dict[str, list[str]] = {}
    for node in program.graph.nodes:
        if node.name in used and used[node.name] not in folded:
            takers.setdefault(used[node.name], []).extend(user.name for user in node.users)
    return [*found, *(Expected((name,), ((weights[name],),), tuple(by)) for name, by in takers.items())]


def _folding(node: Any, used: Mapping[str, str]) -> tuple[list[str], list[str]] | None:
    """Names of the tensors of a convolution and of the normalisation `node` that alone takes what it gives."""
    if "batch_norm" not in str(node.target) or node.op != "call_function":
        return None
    before = node.args[0]
    if "conv" not in str(before.target) or len(before.users) > 1:
        return None
    convolution = [used[each.name] for each in before.args[1:3] if getattr(each, "name", None) in used]
    normalisation = [used[each.name] for each in node.args[1:5] if getattr(each, "name", None) in used]
    return (convolution, normalisation) if convolution and len(normalisation) == 4 else None


def _folded(
    convolution: list[str],
    normalisation: list[str],
    epsilon: float,
    weights: Mapping[str, Array],
    operations: tuple[str, ...],
) -> Expected:
    kernel, *bias = (weights[name].astype(np.float64) for name in convolution)
    gamma, beta, mean, variance = (weights[name].astype(np.float64) for name in normalisation)
    scale = gamma / np.sqrt(variance + epsilon)
    shift = beta + ((bias[0] if bias else 0.0) - mean) * scale
    names = (*convolution, *normalisation)
    apart = tuple(weights[name] for name in names)
    return Expected(names, ((kernel * scale.reshape(-1, *[1] * (kernel.ndim - 1)), shift), apart), operations)


def in_place(wanted: Sequence[Expected], held: Held) -> int:
    """How many of the tensors have a layer that the file names: of others it is only known that they are somewhere."""
    named = {operation for operation, _ in held}
    return sum(len(one.names) for one in wanted if named.intersection(one.operations))


def compare(wanted: Sequence[Expected], held: Held, kind: type[np.floating[Any]]) -> float:
    """The largest difference of a value from the expected one in `kind`, as a share of its tensor's largest value.

    What a file holds for a layer that it names is no other layer's: two of one shape that were exchanged are refused.
    Raises ValueError, which names the tensors, where what is held is further from all their forms than folding rounds.
    """
    tolerance = _TOLERANCES[kind]
    by_size: dict[int, list[tuple[str, Array]]] = {}
    for operation, array in held:
        by_size.setdefault(array.size, []).append((operation, array.ravel().astype(np.float64)))
    named = {operation for one in wanted for operation in one.operations}
    worst = 0.0
    for one in wanted:
        others = named.difference(one.operations) if one.operations else ()

        def away(array: Array, others: Collection[str] = others) -> float:
            found = [values for operation, values in by_size.get(array.size, ()) if operation not in others]
            return _apart(array.astype(kind), found)

        apart = min(max(map(away, form), default=0.0) for form in one.forms)
        if not apart <= tolerance:
            told = "has nothing of their size" if math.isinf(apart) else f"is {apart:.2g} of their largest value away"
            raise ValueError(f"what it holds for {', '.join(one.names)} is not the checkpoint's: what comes nearest {told}")
        worst = max(worst, apart)
    return worst


def _apart(array: Array, candidates: Sequence[Array]) -> float:
    values = array.ravel().astype(np.float64)
    # Below its smallest normal number a kind keeps fewer digits, and converters round there in ways of their own.
    largest = max(float(np.abs(values).max(initial=0.0)), float(np.finfo(array.dtype).smallest_normal))
    apart = [float(np.abs(values - each).max(initial=0.0)) / largest for each in candidates]
    # A value that is not a number is near to nothing.
    return min((each for each in apart if not math.isnan(each)), default=math.inf)
