"""Distillation: a student learns what a teacher answers, beside the labels (Hinton, Vinyals & Dean 2015).

The teacher is frozen: what its backbone makes of a picture and of each of its cached views is computed once, by its own
preprocessing, through the fastest engine, and kept where other trainings find it (components/features.py). Its head, one
small layer, is asked whenever a batch is taken, so that memory does not grow with the number of pictures. It is asked about
pictures that train, and about no others. See infra/decisions/0034.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from components import plugins
from components.contracts.data import Renames, names_after
from components.contracts.errors import CheckpointMismatch, ConfigError, TamperedArtefact, UnknownName
from components.contracts.families import Backbone
from components.contracts.models import Checkpoint
from components.contracts.progress import Progress
from components.contracts.records import Record, Stored
from components.features import Frozen, View, maps
from components.fitting import Examples, Inputs, LossFunction
from components.store import read_manifest

if TYPE_CHECKING:
    import torch
    from torch import nn


class Teacher(Record):
    """Whose answers are learned, and how much they count."""

    champion: str = ""
    """The registered model whose champion teaches: that of the day on which the training is done."""
    checkpoint: str = ""
    """Or the folder of a training's result, relative to the workspace, such as .visionloop/runs/RUN/3-training."""
    temperature: float = Field(default=2.0, ge=0.1, le=100)
    """What the logits of both are divided by before they are compared: above 1, what is unlikely counts, too."""
    share: float = Field(default=0.7, gt=0, le=1)
    """Of the teacher in the loss; the phase's own loss, on the labels, has the rest."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if bool(self.champion) == bool(self.checkpoint):
            raise ValueError(
                "name one teacher: champion, a registered model, or checkpoint, the folder of a training's result; "
                f"{'both are' if self.champion else 'none is'} given"
            )
        return self


def stored_checkpoint(folder: Path) -> tuple[Stored[Checkpoint], str]:
    """The checkpoint of a published folder, verified, and the hash of the data version that it was trained on.

    Raises ConfigError for a folder that holds none, TamperedArtefact.
    """
    place = f"training.teacher.checkpoint: {folder}"
    if not folder.is_dir():
        raise ConfigError(
            f"{place} is no folder; expected one that a training published, such as .visionloop/runs/RUN/3-training"
        )
    # A run's folder holds links to what is published.
    published = folder.resolve()
    try:
        manifest = read_manifest(published)
    except TamperedArtefact as error:
        raise TamperedArtefact(f"{place} cannot teach: {error}") from None
    if manifest["kind"] not in ("training", "optimisation"):
        raise ConfigError(
            f"{place} holds a result of {manifest['kind']!r}; expected that of a training or an optimisation, which never "
            f"saw frozen test pictures"
        )
    return Stored(Checkpoint.read(manifest["record"]), published), str(manifest["provenance"].get("data_version", ""))


def expect_teaches(record: Checkpoint, renamed: Renames, classes: Sequence[str], task: str, told: str) -> None:
    """Raise ConfigError where a teacher does not answer what the student is to learn; `told` names it in words."""
    if record.task != task:
        raise ConfigError(
            f"training.teacher: {told}, was trained for the task {record.task!r}, and the student is for {task!r}; "
            f"choose a teacher of the same task"
        )
    known = names_after(record.classes, renamed)
    if set(known) != set(classes):
        raise ConfigError(
            f"training.teacher: {told}, answers about other classes than the data have ({differing(known, classes)}); "
            f"choose another teacher, or train without one. A class that only gets another name gets it by "
            f"`visionloop data rename-class`"
        )
    try:
        plugins.member_file("backbones", record.backbone)
    except UnknownName as error:
        raise ConfigError(f"training.teacher: {told}, cannot be built: {error}") from None


def differing(known: Sequence[str], classes: Sequence[str]) -> str:
    """Which classes of the data a model does not know, and which of its own the data do not have."""
    new = [name for name in classes if name not in known]
    gone = [name for name in known if name not in classes]
    return f"new: {', '.join(new) or 'none'}; gone: {', '.join(gone) or 'none'}"


@dataclass(frozen=True)
class Teaching:
    """A teacher that is ready to be asked."""

    config: Teacher
    name: str
    """Of its backbone."""
    backbone: Backbone
    state: dict[str, torch.Tensor]
    """Of its backbone."""
    head: nn.Module
    order: tuple[int, ...]
    """Which of its answers is about each class of the data."""
    embedding_dim: int
    """Of its features, which are fewer than the backbone's where a pass took some away."""

    @classmethod
    def of(
        cls, config: Teacher, checkpoint: Stored[Checkpoint], renamed: Renames, classes: Sequence[str], task: str
    ) -> Teaching:
        """Raises ConfigError for a teacher of another task, of other classes, or with a backbone that is not here."""
        from components.checkpoints import restore

        record = checkpoint.record
        expect_teaches(record, renamed, classes, task, "the teacher")
        try:
            model = restore(checkpoint)
        except (UnknownName, CheckpointMismatch) as error:
            raise ConfigError(f"training.teacher: the teacher's network cannot be built: {error}") from None
        known = names_after(record.classes, renamed)
        return cls(
            config,
            record.backbone,
            plugins.load("backbones", record.backbone, dict(record.backbone_settings)),
            model.backbone.state_dict(),
            copy.deepcopy(model.head).eval(),
            tuple(known.index(name) for name in classes),
            record.embedding_dim,
        )

    def examples(
        self,
        taught: Examples,
        pictures: Sequence[str],
        paths: Sequence[Path],
        views: Sequence[View],
        *,
        cache: Path,
        num_threads: int,
        progress: Progress,
        say: Callable[[str], None],
    ) -> TaughtExamples:
        """The examples, whose pictures these are, with what the teacher says of each view of them."""
        frozen = Frozen(self.name, self.backbone, self.state, embedding_dim=self.embedding_dim)
        seen = maps(pictures, paths, frozen, views, cache=cache, num_threads=num_threads, progress=progress, say=say)
        return TaughtExamples(taught, seen, self)

    def answers(self, features: torch.Tensor) -> torch.Tensor:
        """Softened probabilities of the data's classes (n, classes), of the teacher's features (n, d)."""
        import torch

        with torch.no_grad():
            logits = self.head(features)[:, list(self.order)]
            return torch.softmax(logits / self.config.temperature, dim=1)

    def loss(self, own: LossFunction, *, mixed: bool) -> LossFunction:
        """The loss of logits and the targets of TaughtExamples; `own` is that of the labels, which are shares when `mixed`.

        The divergence is multiplied by the square of the temperature, so that its gradient is as large as at 1.
        """
        from torch.nn import functional

        temperature, share = self.config.temperature, self.config.share

        def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            labels, answers = targets.chunk(2, dim=1)
            student = functional.log_softmax(logits.float() / temperature, dim=1)
            found = share * temperature**2 * functional.kl_div(student, answers, reduction="batchmean")
            return found if share == 1 else found + (1 - share) * own(logits, labels if mixed else labels.argmax(dim=1))

        return loss


class TaughtExamples(Examples):
    """Examples whose targets, when they are taken, are the shares of classes and, beside them, the teacher's answers.

    Both are mixed by the same shares where examples are mixed. The teacher is asked about the very view that is taken.
    """

    def __init__(self, taught: Examples, seen: Inputs, teaching: Teaching) -> None:
        super().__init__(taught.inputs, taught.targets)
        self._seen, self._teaching = seen, teaching

    def take(self, rows: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs (m, ...) and targets (m, 2 * classes) of the chosen rows."""
        import torch
        from torch.nn import functional

        # The same draw of views, from a copy of the generator, which is left as it is without a teacher.
        same = torch.Generator()
        same.set_state(generator.get_state())
        inputs, targets = super().take(rows, generator)
        answers = self._teaching.answers(self._seen.take(rows, same))
        labels = functional.one_hot(targets, answers.shape[1])
        return inputs, torch.cat([labels.to(answers.dtype), answers], dim=1)
