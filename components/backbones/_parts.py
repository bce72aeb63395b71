"""Parts of a network by their names."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def parts(module: nn.Module, *names: str, whole: bool = False) -> list[nn.Module]:
    """Sub-modules of these names; a list of modules counts as its members unless it is taken `whole`."""
    from torch import nn

    found: list[nn.Module] = []
    for name in names:
        part = module.get_submodule(name)
        found += list(part) if isinstance(part, nn.Sequential | nn.ModuleList) and not whole else [part]
    return found
