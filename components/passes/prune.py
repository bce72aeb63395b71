"""Structured pruning: whole channels are taken away, so that parameters, multiplications and measured time fall.

Which channels go together through residual sums, depthwise convolutions and flattened maps is found by torch-pruning's
dependency graph (Fang et al. 2023). Each group of them loses the same share; which channels it loses is told by how much
the loss would change without each (Molchanov et al. 2019), or by their weights. The heads of attention stay whole, and with
them the width of a transformer: its hidden layers are pruned alone.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from components.contracts.errors import ConfigError, UnknownName
from components.contracts.families import PassRequest
from components.contracts.wording import counted

if TYPE_CHECKING:
    import torch
    from torch import nn


class Pass(BaseModel):
    """Takes `share` of the parameters, or of the multiplications, away."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: float = Field(default=0.3, gt=0, lt=1)
    """Of what the network has before the first step."""
    of: Literal["parameters", "macs"] = "parameters"
    """`macs` are the multiplications and additions for one image."""
    steps: int = Field(default=3, ge=1, le=100)
    """The share is taken in so many equal parts, with a fine-tuning after each."""
    importance: Literal["taylor", "magnitude"] = "taylor"
    """What tells the channels to lose: how much the loss on training images hangs on each, or how large its weights are."""
    num_images: int = Field(default=256, ge=1, le=100_000)
    """Of training images that `taylor` looks at, at most."""
    round_to: int = Field(default=8, ge=1, le=64)
    """Groups of at least twice as many channels keep a multiple of it: runtimes compute in blocks, and fill up the last."""
    keep: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Layers that lose nothing, such as `backbone.layer1`, with all that goes together with them."""
    only: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Layers that lose channels; empty for all that can."""

    @property
    def undone_by_training(self) -> str:
        return ""

    def begin(self, network: nn.Module, request: PassRequest) -> None:
        """Take away channels until the share of this step is gone."""
        groups = self._groups(network, request)
        wanted = self.share * request.step / self.steps
        before = request.before.macs if self.of == "macs" else request.before.parameters
        costs = _Costs(network, request.example, groups, of=self.of)
        self._choose(groups, costs, target=before * (1 - wanted), before=before)
        scores = _Scores.of(network, request, groups, self.num_images) if self.importance == "taylor" else _Scores({})
        for group in groups:
            if group.lost:
                score = scores.of_channels(group)
                order = sorted(range(group.size), key=score.__getitem__)
                group.members.prune(sorted(order[: group.lost]))
        if left := _left(groups):
            request.note(left)

    def end(self, network: nn.Module, request: PassRequest) -> None:
        """Nothing is left to do: the channels are gone."""

    def _groups(self, network: nn.Module, request: PassRequest) -> list[_Group]:
        """All groups of channels that go together, with the reason of those that cannot be pruned; raises ConfigError."""
        import torch
        import torch_pruning
        from torch import nn

        names = {module: name for name, module in network.named_modules()}
        for setting in ("keep", "only"):
            for name in getattr(self, setting):
                if name not in names.values():
                    layers = [
                        known for known, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)
                    ]
                    raise UnknownName(f"layer in {setting}", name, layers)
        # One that is drawn from a set has another place in every process.
        loose = _loose_parameters(network)
        with torch.enable_grad(), _silent():
            graph = torch_pruning.DependencyGraph().build_dependency(
                network,
                request.example,
                output_transform=lambda answer: answer[0],
                unwrapped_parameters=loose,
                verbose=False,
            )
            found = [_Group.of(members, names) for members in graph.get_all_groups()]
        whole = _attention(names) | dict.fromkeys(_below(names.values(), self.keep), "keep names it")
        for group in found:
            group.why = next((f"{whole[name]} ({name})" for name in group.layers if name in whole), group.why)
        if self.only:
            self._expect_prunable(found, names)
            chosen = set(_below(names.values(), self.only))
            for group in found:
                if not group.why and not chosen & set(group.losing):
                    group.why = "only names others"
        return found

    def _expect_prunable(self, groups: Sequence[_Group], names: Mapping[Any, str]) -> None:
        """Raise ConfigError for a layer that the recipe names and that cannot lose channels."""
        for name in self.only:
            below = _below(names.values(), (name,))
            own = [group for group in groups if set(below) & set(group.losing)]
            if not own or all(group.why for group in own):
                why = next((group.why for group in own if group.why), "it has no channels that could go")
                raise ConfigError(f"only: {name} cannot be pruned: {why}; name another layer, or leave it out")

    def _choose(self, groups: Sequence[_Group], costs: _Costs, *, target: float, before: int) -> None:
        """How many channels each group loses: the same share of all, as few as it takes; raises ConfigError."""
        prunable = [group for group in groups if not group.why]
        # (share of its channels that would be gone, group, channels gone): in the order in which all lose alike.
        events = sorted(
            (lost / group.size, number, lost) for number, group in enumerate(prunable) for lost in self._choices(group.size)
        )

        def cost(num_events: int) -> float:
            for group in prunable:
                group.lost = 0
            for _, number, lost in events[:num_events]:
                prunable[number].lost = lost
            return costs.total()

        if cost(len(events)) <= target:
            cost(bisect.bisect_left(range(len(events)), True, key=lambda num_events: cost(num_events) <= target))
            return
        most = 1 - costs.total() / before
        left = _left(groups)
        raise ConfigError(
            f"share: {self.share:g} of the {_WORDS[self.of]} cannot be taken from this network, whose layers keep "
            f"{counted(self.round_to, 'channel')} or one at least: {most:.2f} is the most"
            + (f" ({left})" if left else "")
            + "; lower it"
        )

    def _choices(self, size: int) -> Iterator[int]:
        """How many of so many channels may go: at least one block stays, or one channel where there are not two blocks."""
        unit = self.round_to if size >= 2 * self.round_to else 1
        kept = size - 1 - (size - 1) % unit
        while kept >= unit:
            yield size - kept
            kept -= unit


_WORDS = {"parameters": "parameters", "macs": "multiplications (macs)"}


@dataclass(eq=False)
class _Group:
    """Channels that go together through the network."""

    members: Any
    """torch-pruning's group, of all channels."""
    size: int
    """How many channels it has."""
    layers: tuple[str, ...]
    """All that it reaches, those that lose channels first."""
    losing: tuple[str, ...]
    """Layers whose output loses channels."""
    changes: tuple[tuple[Any, bool, float], ...]
    """Each layer or parameter that becomes smaller: whether in its outputs, and by how many of them a channel."""
    items: tuple[tuple[Any, bool], ...]
    """The same as torch-pruning's items, with the channels of each."""
    why: str = ""
    """Why it stays as it is; empty where it can lose channels."""
    lost: int = 0

    @classmethod
    def of(cls, members: Any, names: Mapping[Any, str]) -> _Group:
        from torch import nn

        graph, size = members._DG, len(members[0].idxs)
        named = {id(parameter): name for parameter, name in graph._param_to_name.items()}
        changes: list[tuple[Any, bool, float]] = []
        items: list[tuple[Any, bool]] = []
        losing: list[str] = []
        others: list[str] = []
        why = ""
        for item in members.items:
            layer, gives = item.dep.target.module, graph.is_out_channel_pruning_fn(item.dep.handler)
            name = names.get(layer) if isinstance(layer, nn.Module) else named.get(id(layer))
            if name is None:
                continue  # a step of the computation that has no weights
            changes.append((layer, gives, len(item.idxs) / size))
            items.append((item, gives))
            (losing if gives else others).append(name)
            if gives and name.startswith("head."):
                why = why or f"the head gives one answer a class ({name})"
            if any(root is None for root in item.root_idxs) or len(item.idxs) % size:
                why = why or f"its channels cannot be told apart ({name})"
            if isinstance(layer, nn.GroupNorm) or (isinstance(layer, nn.Conv2d) and 1 < layer.groups < layer.in_channels):
                why = why or f"what computes in groups of channels stays whole ({name})"
        return cls(members, size, (*losing, *others), tuple(losing), tuple(changes), tuple(items), why)


def _loose_parameters(network: nn.Module) -> list[Any]:
    """Parameters that belong to no layer that the dependency graph knows, in the order of their names."""
    from torch import nn
    from torch_pruning._helpers import UnwrappedParameters

    known = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.PReLU)
    wrapped = {id(p) for layer in network.modules() if isinstance(layer, known) for p in layer.parameters(recurse=False)}
    found = []
    for _, parameter in sorted(network.named_parameters()):
        wide = [dimension for dimension, length in enumerate(parameter.shape) if length > 1]
        if id(parameter) not in wrapped and wide and not _is_of_attention(network, parameter):
            found.append(UnwrappedParameters(parameters=parameter, pruning_dim=wide[-1]))
    return found


def _is_of_attention(network: nn.Module, parameter: nn.Parameter) -> bool:
    from torch import nn

    return any(parameter is own for m in network.modules() if isinstance(m, nn.MultiheadAttention) for own in m.parameters())


def _attention(names: Mapping[Any, str]) -> dict[str, str]:
    """The layers of attention, and why they lose no channels."""
    # What holds attention may say so, too; only what computes it has no such layer inside.
    heads = [
        name
        for module, name in names.items()
        if hasattr(module, "num_heads") and sum(hasattr(inside, "num_heads") for inside in module.modules()) == 1
    ]
    return dict.fromkeys(_below(names.values(), heads), "the heads of attention stay whole")


def _below(names: Any, chosen: Sequence[str]) -> list[str]:
    """The layers of these names, and those inside them."""
    return [name for name in names if any(name == one or name.startswith(f"{one}.") for one in chosen)]


def _left(groups: Sequence[_Group]) -> str:
    """What stays as it is, in words; empty for nothing but the head's answers and what the recipe names."""
    found: dict[str, int] = {}
    for group in groups:
        why = group.why.partition(" (")[0]
        if why and not why.startswith(("the head gives", "only names", "keep names")):
            found[why] = found.get(why, 0) + 1
    return "; ".join(
        f"left as they are: {counted(number, 'group')} of channels, since {why}" for why, number in found.items()
    )


class _Costs:
    """Parameters, or multiplications, of a network whose groups lose channels."""

    def __init__(self, network: nn.Module, example: torch.Tensor, groups: Sequence[_Group], *, of: str) -> None:
        from torch import nn

        from components.network_size import multiplications

        self._groups = groups
        macs = multiplications(network, example) if of == "macs" else {}
        # (how much it costs, by which groups its outputs and its inputs become fewer, how many of each there are)
        self._parts: list[tuple[int, list[tuple[_Group, float]], list[tuple[_Group, float]]]] = []
        fewer: dict[tuple[int, bool], list[tuple[_Group, float]]] = {}
        for group in groups:
            for layer, gives, each in () if group.why else group.changes:
                length = _length(layer, gives)
                fewer.setdefault((id(layer), gives), []).append((group, each / length))
        for layer in network.modules():
            for name, parameter in layer.named_parameters(recurse=False):
                weight = name == "weight" and isinstance(layer, nn.Conv2d | nn.Linear)
                cost = macs.get((layer, name), 0) if of == "macs" else parameter.numel()
                if not cost:
                    continue
                outputs = fewer.get((id(layer), True), []) + fewer.get((id(parameter), True), [])
                inputs = fewer.get((id(layer), False), []) if weight else []
                self._parts.append((cost, outputs, inputs))

    def total(self) -> float:
        """With the channels gone that the groups say are lost."""
        return sum(
            cost
            * (1 - sum(group.lost * share for group, share in outputs))
            * (1 - sum(g.lost * share for g, share in inputs))
            for cost, outputs, inputs in self._parts
        )


def _length(layer: Any, gives: bool) -> int:
    """How many outputs or inputs a layer has; of a parameter, the channels that may go."""
    from torch import nn

    if isinstance(layer, nn.Conv2d):
        return layer.out_channels if gives else layer.in_channels
    if isinstance(layer, nn.Linear):
        return layer.out_features if gives else layer.in_features
    if isinstance(layer, nn.Parameter):
        return max(layer.shape)
    return len(layer.weight) if layer.weight is not None else len(layer.running_mean)


@dataclass(frozen=True)
class _Scores:
    """How much each channel of a group matters."""

    taylor: Mapping[_Group, torch.Tensor]

    @classmethod
    def of(cls, network: nn.Module, request: PassRequest, groups: Sequence[_Group], num_images: int) -> _Scores:
        """The square of what the loss on a batch would change by without a channel, to first order, in the sum of all."""
        import torch

        found = {group: torch.zeros(group.size, dtype=torch.float64) for group in groups if group.lost}
        seen = 0
        for images, targets in request.images():
            images, targets = images[: num_images - seen], targets[: num_images - seen]
            network.zero_grad(set_to_none=True)
            with torch.enable_grad():
                request.task.loss(network(images)[0], targets).backward()  # type: ignore[no-untyped-call]
            for group, score in found.items():
                score += _changes(group)
            seen += len(images)
            if seen >= num_images:
                break
        network.zero_grad(set_to_none=True)
        return cls(found)

    def of_channels(self, group: _Group) -> list[float]:
        score = self.taylor[group] if group in self.taylor else _sizes(group)
        found: list[float] = score.tolist()
        return found


def _changes(group: _Group) -> torch.Tensor:
    """(channels,) of the gradients that are there: where the channels are normalised, without its scale and its shift."""
    import torch
    from torch import nn

    weighted = (nn.Conv2d, nn.Linear)
    giving = [item for item, gives in group.items if gives and isinstance(item.dep.target.module, nn.Module)]
    norms = [item for item in giving if not isinstance(item.dep.target.module, weighted)]
    found = torch.zeros(group.size, dtype=torch.float64)
    for item in norms or giving:
        layer = item.dep.target.module
        change = sum(
            (parameter * parameter.grad)
            .detach()
            .double()
            .flatten(1 if parameter.ndim > 1 else 0)
            .reshape(len(parameter), -1)
            .sum(1)
            for parameter in layer.parameters(recurse=False)
            if parameter.grad is not None
        )
        if isinstance(change, torch.Tensor):
            found.index_add_(0, torch.tensor(item.root_idxs), change[item.idxs] ** 2)
    return found


def _sizes(group: _Group) -> torch.Tensor:
    """(channels,) sums of squared weights, of those that make a channel and of those that take it."""
    import torch
    from torch import nn

    found = torch.zeros(group.size, dtype=torch.float64)
    for item, gives in group.items:
        layer = item.dep.target.module
        if isinstance(layer, nn.Conv2d | nn.Linear):
            depthwise = isinstance(layer, nn.Conv2d) and layer.groups > 1
            weight = layer.weight.detach().double()
            by_channel = weight if gives or depthwise else weight.transpose(0, 1)
            found.index_add_(0, torch.tensor(item.root_idxs), by_channel.flatten(1).pow(2).sum(1)[item.idxs])
    return found


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """What the library warns of is looked at here."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
