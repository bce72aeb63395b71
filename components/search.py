"""What a search of recipes tries: the space, how many trials, and how they are proposed, stopped and compared.

A recipe keeps it as its section `search`. What a training makes does not depend on it.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import (
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from components.contracts.records import Record, canonical_json


class Dimension(Record):
    """What a search may choose for one key of a recipe: numbers from `low` to `high`, or one of some `choices`."""

    low: int | float | None = Field(default=None, description="The smallest number that is tried.")
    high: int | float | None = Field(default=None, description="The largest number that is tried.")
    log: bool = Field(default=False, description="Every power of ten is as likely as the next; low has to be above 0.")
    step: int | float | None = Field(default=None, gt=0, description="Only low, low + step, and so on are tried.")
    choices: tuple[JsonValue, ...] = Field(
        default=(), description="Values of any kind, such as [head, {last: 1}, {last: 2}]."
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.choices:
            if (self.low, self.high, self.log, self.step) != (None, None, False, None):
                raise ValueError("choices beside low, high, log or step; give a range or choices, not both")
            told = [spelled(choice) for choice in self.choices]
            twice = [name for name in told if told.count(name) > 1]
            if twice or len(told) < 2:
                what = f"{twice[0]} is there twice" if twice else f"{told[0]} alone leaves nothing to choose"
                raise ValueError(f"choices: {what}; name two or more that differ")
            return self
        if self.low is None or self.high is None:
            raise ValueError("it needs low and high, or choices")
        if self.low >= self.high:
            raise ValueError(f"low is {self.low} and high is {self.high}; low has to be below high")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs a low above 0, and low is {self.low}")
        if self.log and self.step is not None:
            raise ValueError("log and step exclude each other; remove one of them")
        if self.step is not None and self.step > self.high - self.low:
            raise ValueError(f"step is {self.step}, which is more than lies between low and high; lower it")
        return self

    @model_serializer(mode="wrap")
    def _as_said(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        kept = {"schema_version"}
        values = handler(self)
        return {key: value for key, value in values.items() if key in kept or getattr(self, key) != fields[key].default}


def spelled(value: JsonValue) -> str:
    """A choice as text: text as it is, all else as JSON."""
    return value if isinstance(value, str) else canonical_json(value)


class SearchConfig(Record):
    """A search: many trainings of the recipe with other values, of which the best becomes a recipe of its own."""

    space: dict[str, Dimension] = Field(
        description="Keys of the section `training`, spelled as for --set, and what may be chosen for each of them."
    )
    trials: int = Field(
        default=20, ge=1, le=10_000, description="How many trainings, those that are stopped early included."
    )
    objective: Literal["headline", "valid_loss"] = Field(
        default="headline",
        description="What the best trial is best in, on the valid split: the task's headline metric, or the loss.",
    )
    sampler: Literal["tpe", "random"] = Field(
        default="tpe", description="How values are proposed: by what earlier trials came to (TPE), or at random."
    )
    one_at_a_time: bool = Field(
        default=True,
        description="The first trials are the recipe's own values, and these with one of them changed at a time: "
        "what has no effect is found.",
    )
    pruner: Literal["median", "none"] = Field(
        default="median",
        description="Whether a trial is stopped whose best epoch so far is below the median of the complete ones' by that "
        "epoch; of equal ones the valid loss decides.",
    )
    startup_trials: int = Field(default=5, ge=1, description="Trials that are complete before any is stopped.")
    warm_up_epochs: int = Field(default=1, ge=0, description="Epochs of the last phase in which no trial is stopped.")
    seed: int = Field(default=0, ge=0, description="What is proposed depends on it, and on nothing else that is random.")

    @field_validator("space")
    @classmethod
    def _something(cls, space: dict[str, Dimension]) -> dict[str, Dimension]:
        if not space:
            raise ValueError(
                "it is empty, so there is nothing to search; name keys of training with their bounds, such as "
                "training.fit.learning_rate: {low: 0.0001, high: 0.01, log: true}"
            )
        strangers = [key for key in space if not key.startswith("training.")]
        if strangers:
            raise ValueError(
                f"{strangers[0]} is no key of training; a search compares trainings on the same images, so every key "
                f"begins with training., such as training.fit.learning_rate"
            )
        idle = [key for key in space if key.startswith("training.compute")]
        if idle:
            raise ValueError(f"{idle[0]} changes how fast a training is, and nothing of what it learns; remove it")
        lucky = [key for key in space if key.rpartition(".")[2] == "seed"]
        if lucky:
            raise ValueError(f"{lucky[0]} would only choose the luckiest draw; remove it")
        return space

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        other = [key for key in self.space if key == "training.task" or key.startswith("training.task_settings")]
        if other and (self.objective == "valid_loss" or other[0] == "training.task"):
            raise ValueError(
                f"{other[0]} changes what the valid loss means, so that losses cannot be compared; "
                + ("remove it" if other[0] == "training.task" else "set objective: headline, or remove it")
            )
        return self


class Tuned(Record):
    """The search that a recipe's values come from."""

    study: str
    study_digest: str
    """Of the study's first `trials` trials: what was searched, and what each of them came to."""
    trials: int = Field(ge=1)
    trial: int = Field(ge=0)
    """The number of the trial whose values these are."""

    @property
    def told(self) -> str:
        """In words, for whoever reads of a model."""
        return (
            f"Values of the recipe: the best of {self.trials} trials (number {self.trial}) of study {self.study}, by the "
            f"valid split alone; study digest {self.study_digest[:16]}"
        )
