"""A program of torch -> a TFLite file, by litert-torch; runs in the environment `litert`."""

from __future__ import annotations

from typing import Any

from components.converters.answering import answer


def convert(request: dict[str, Any]) -> dict[str, Any]:
    """Write `out`: one uint8 image of `shape` (1, h, w, c) to `logits` and `embedding`."""
    import litert_torch
    import torch

    class Named(torch.nn.Module):
        """A TFLite file names its outputs by the keys of what the module answers."""

        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            logits, embedding = self.module(images)
            return {"logits": logits, "embedding": embedding}

    module = Named(torch.export.load(request["program"]).module())
    example = torch.zeros(request["shape"], dtype=torch.uint8)
    litert_torch.convert(module, sample_kwargs={"images": example}).export(request["out"])
    return {"runtime": f"litert-torch {litert_torch.__version__}"}


if __name__ == "__main__":
    answer(convert)
