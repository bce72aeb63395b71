"""Records of models: preprocessing, checkpoint, engine."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from components.contracts.records import FileDigest, Record


class Preprocessing(Record):
    """How a file becomes the engine's input: decode, colours, EXIF-rotate, resize the short side, crop the centre.

    The result is uint8 (height, width, channels). Scaling to `(x / 255 - mean) / std` is part of every
    engine's graph, so no caller repeats it.
    """

    channels: Literal[1, 3]
    height: int = Field(ge=8, le=1024)
    width: int = Field(ge=8, le=1024)
    resize_shortest: int = Field(ge=8, le=2048)
    """Length in pixels of the short side before the centre crop; equal to height and width for no margin."""
    interpolation: Literal["bilinear", "bicubic"]
    """Always antialiased."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    colour: Literal["srgb", "as stored"] = Field(default="", validate_default=True)
    """Whether a file's colours are converted to sRGB, which is the default, or are the numbers that it holds.

    Absent in JSON, and only there, it is "as stored": records from before the field are that, and keep their digests.
    """

    @field_validator("colour", mode="before")
    @classmethod
    def _before_the_field(cls, value: Any, info: ValidationInfo) -> Any:
        return value or ("as stored" if info.mode == "json" else "srgb")

    @model_serializer(mode="wrap")
    def _without_the_field(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        if self.colour == "as stored":
            del values["colour"]
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(f"mean and std need one value per channel ({self.channels})")
        if min(self.std) <= 0:
            raise ValueError("std must be positive")
        if self.resize_shortest < max(self.height, self.width):
            raise ValueError("resize_shortest must not be smaller than the crop")
        return self


class NetworkSize(Record):
    """What a network costs, counted."""

    parameters: int
    zeros: int
    """Of them, those that are zero."""
    macs: int
    """Multiplications and additions of convolutions, linear layers and attention's projections for one image, zeros
    included."""
    stored_bytes: int
    """Of its weights as a checkpoint stores them."""


class AppliedPass(Record):
    """One pass that changed a trained network, and what that cost on the valid images, which chose its epochs."""

    name: str
    settings: dict[str, Any]
    """All of them, defaults included."""
    epochs: int
    """Of all fine-tunings together."""
    before: NetworkSize
    after: NetworkSize
    valid: tuple[int, int, int, int]
    """Valid images that both networks, only the one before, only the one after and neither answered right."""
    notes: tuple[str, ...] = ()
    """What it left as it was, and why."""
    compared: dict[str, tuple[int, int, int, int]] = {}
    """The same numbers of the network before and of others that the pass asked, such as `int8 before`; left out of JSON
    where there were none."""

    @model_serializer(mode="wrap")
    def _without_the_field(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        if not self.compared:
            del values["compared"]
        return values


class Optimised(Record):
    """What passes made of a checkpoint."""

    made_of: str
    """Digest of the checkpoint before the first of them."""
    passes: tuple[AppliedPass, ...]
    shapes: dict[str, tuple[int, ...]]
    """Of the tensors that have other shapes than backbone and head are built with, by name."""
    history: FileDigest
    """One row an epoch of fine-tuning."""


class Checkpoint(Record):
    """Trained weights and everything needed to rebuild the module and to read its outputs."""

    splits_digest: str
    task: str
    task_settings: dict[str, bool | int | float | str]
    backbone: str
    backbone_settings: dict[str, bool | int | float | str]
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    embedding_dim: int
    weights: FileDigest
    history: FileDigest
    temperature: float = Field(gt=0)
    """Divides the logits before softmax; fitted on the valid split."""
    best_epoch: int
    epochs: int
    valid_metrics: dict[str, float]
    computed_on: str = ""
    """The hardware and how it was used, in words; empty for a processor in fp32, and left out of JSON there."""
    optimised: Optimised | None = None
    """What passes made of the trained network; None, and absent in JSON, where there were none."""

    @model_serializer(mode="wrap")
    def _without_the_fields(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        if not self.computed_on:
            del values["computed_on"]
        if self.optimised is None:
            del values["optimised"]
        return values


Precision = Literal["fp32", "fp16", "int8"]


class Engine(Record):
    """A model in the form a runtime executes: uint8 NHWC in, `logits` and `embedding` out."""

    name: str
    target: str
    precision: Precision
    settings: dict[str, Any]
    """The target's settings it was built with; it is loaded with the same."""
    checkpoint_digest: str
    files: tuple[FileDigest, ...]
    entry: str
    """The file of `files` that the runtime opens."""
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    embedding_dim: int
    temperature: float = Field(gt=0)
    runtime: str
    """Library and version that built it."""
    built_for: tuple[str, ...]
    """Hardware the file is bound to; empty for any machine that runs the runtime."""
    facts: dict[str, int | float | str]
    """What the builder counted, such as `int8_share`."""

    @property
    def size_bytes(self) -> int:
        return sum(file.bytes for file in self.files)
