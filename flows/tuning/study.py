"""The study of a search, in Optuna's tables: what was tried, what came of it, and what is tried next. Optuna's only home.

One process writes a study, so what it read once it knows. What is proposed is a function of the seed, the trial's number
and the trials before it, and a trial is written whole, in one transaction: a search that is killed at any moment and
started again proposes what it would have proposed.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from components.contracts.errors import (
    ConfigError,
    RegistryUnavailable,
    StudyBusy,
    UnknownName,
    in_short,
    redacted,
)
from components.contracts.records import canonical_json, sha256_text
from components.databases import advice, scheme, sqlite_file
from components.search import SearchConfig
from flows.terminal import Say, silent
from flows.tuning.holding import Hold
from flows.tuning.space import Parameter, Space, Value

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.storages import RDBStorage
    from optuna.study import Study as OptunasStudy
    from optuna.trial import FrozenTrial

T = TypeVar("T")
State = Literal["running", "complete", "pruned", "failed"]
Direction = Literal["maximize", "minimize"]
_IDENTITY, _SPLITS, _TOLD = "visionloop.identity", "visionloop.splits", "visionloop.told"
_FACTS = "visionloop.facts"
_STARTUP = 8
"""Trials that are drawn at random before TPE has something to learn from."""
_REDRAWS = 32
PATIENCE_S = 300.0
"""How long a search waits for its database."""
_OPENS_S = 2.0
"""How long it waits for one that has not answered yet."""
FEWEST = 8
"""Complete trials from which on the importance of parameters is told."""


@dataclass
class Trial:
    """One training of a search, and what came of it so far."""

    number: int
    id: int
    params: dict[str, Value]
    state: State = "running"
    value: float | None = None
    curve: dict[int, float] = field(default_factory=dict)
    """The objective by epoch of the last phase, from 1."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What is told of it: seconds, reason, weights, history."""

    @property
    def finished(self) -> bool:
        return self.state != "running"

    def rank(self, step: int, direction: Direction) -> tuple[float, float]:
        """The best objective by an epoch, and the lowest loss; higher is better in both."""
        sign = 1.0 if direction == "maximize" else -1.0
        losses = [loss for at, loss in self.facts.get("losses", {}).items() if int(at) <= step]
        return max(sign * value for at, value in self.curve.items() if at <= step), -min(losses, default=math.inf)

    @property
    def loss(self) -> float:
        """The lowest valid loss of the last phase."""
        history: list[dict[str, float]] = self.facts.get("history", [])
        last = max((row.get("phase", 1.0) for row in history), default=1.0)
        return min((row["valid_loss"] for row in history if row.get("phase", 1.0) == last), default=math.inf)


@dataclass(frozen=True)
class StudyHead:
    """A study as a list shows it."""

    name: str
    identity: Mapping[str, Any]
    told: Mapping[str, Any]


def heads(url: str) -> list[StudyHead]:
    """The studies of a database that are searches of ours; none where there is no database yet."""
    file = sqlite_file(url)
    if file is not None and not file.exists():
        return []
    found = _asked(url, lambda: _storage(url).get_all_studies(), patience_s=0)
    return [
        StudyHead(one.study_name, one.user_attrs[_IDENTITY], one.user_attrs.get(_TOLD, {}))
        for one in found
        if _IDENTITY in one.user_attrs
    ]


class Study:
    """The trials of one study. Every call waits while the database is away, and then raises RegistryUnavailable."""

    def __init__(self, url: str, name: str, *, say: Say = silent, patience_s: float = PATIENCE_S) -> None:
        self.url, self.name = url, name
        self._say, self._patience_s = say, patience_s
        self.hold = Hold()
        """What is asked before anything is written."""
        # Long enough for another search that is just making the tables; a wrong address or password is told at once.
        self._storage = _asked(url, lambda: _storage(url), say=say, patience_s=min(patience_s, _OPENS_S))
        self._id = -1
        self.direction: Direction = "maximize"
        self.identity: dict[str, Any] = {}
        self.trials: list[Trial] = []

    def open(self) -> None:
        """Read what is there; raises UnknownName where no study is called so."""
        try:
            self._id = self._asked(lambda: self._storage.get_study_id_from_name(self.name))
        except KeyError:
            raise UnknownName("study", self.name, [head.name for head in heads(self.url)]) from None
        self._read()

    def begin(self, identity: Mapping[str, Any], direction: Direction) -> None:
        """Open the study, made now where there is none; raises ConfigError for one of another search."""
        from optuna.exceptions import DuplicatedStudyError
        from optuna.study import StudyDirection

        directions = [StudyDirection.MAXIMIZE if direction == "maximize" else StudyDirection.MINIMIZE]

        def found() -> int:
            try:
                return self._storage.get_study_id_from_name(self.name)
            except KeyError:
                self.hold.expect(self.name)
                with contextlib.suppress(DuplicatedStudyError):  # made by an attempt whose answer was lost
                    return self._storage.create_new_study(directions, self.name)
                return self._storage.get_study_id_from_name(self.name)

        self._id = self._asked(found)
        self._read()
        if not self.identity and not self.trials:
            self._written(lambda: self._storage.set_study_user_attr(self._id, _IDENTITY, dict(identity)))
            self.identity, self.direction = dict(identity), direction
        _expect_same(self.name, self.identity, identity)

    def describe(self, told: Mapping[str, Any]) -> None:
        """Keep what a page says of the search, for whoever shows it without its recipe."""
        self._written(lambda: self._storage.set_study_user_attr(self._id, _TOLD, dict(told)))

    @property
    def described(self) -> dict[str, Any]:
        """What `describe` kept; empty while the images are still being looked at."""
        return self._attribute(_TOLD) or {}

    def expect_splits(self, digest: str) -> None:
        """The trials of a study share their images; raises ConfigError where they were divided in another way."""
        known = self._attribute(_SPLITS)
        if known is None:
            self._written(lambda: self._storage.set_study_user_attr(self._id, _SPLITS, digest))
        elif known != digest:
            raise ConfigError(
                f"study {self.name!r} compared trainings on other splits of the images ({known[:12]}, now {digest[:12]}); "
                f"name a new one: --study NAME"
            )

    def start(self, params: Mapping[str, Value], space: Space, facts: Mapping[str, Any]) -> Trial:
        """Write a trial that begins now, with what is told of it from the beginning."""
        from optuna.trial import FrozenTrial, TrialState

        template = FrozenTrial(
            number=-1,
            trial_id=-1,
            state=TrialState.RUNNING,
            value=None,
            datetime_start=datetime.now(),
            datetime_complete=None,
            params=dict(params),
            distributions=_distributions(space.parameters),
            user_attrs={_FACTS: dict(facts)},
            system_attrs={},
            intermediate_values={},
        )
        known = len(self.trials)

        def write() -> Trial:
            # An answer that was lost on its way back is found again.
            there = [_trial(one) for one in self._storage.get_all_trials(self._id, deepcopy=False)[known:]]
            if there:
                if len(there) > 1 or there[0].finished or there[0].params != dict(params):
                    raise StudyBusy(self._of_another)
                return there[0]
            made = self._storage.create_new_trial(self._id, template)
            return _trial(self._storage.get_trial(made))

        trial = self._written(write)
        self.trials.append(trial)
        return trial

    def report(self, trial: Trial, step: int, value: float, loss: float) -> None:
        """What a trial has come to by an epoch: the objective and the valid loss."""
        self.note(trial, losses={**trial.facts.get("losses", {}), str(step): loss})
        self._written(lambda: self._storage.set_trial_intermediate_value(trial.id, step, value))
        trial.curve[step] = value

    def note(self, trial: Trial, **facts: Any) -> None:
        """What else is told of a trial."""
        whole = trial.facts | facts
        self._written(lambda: self._storage.set_trial_user_attr(trial.id, _FACTS, whole))
        trial.facts = whole

    def finish(self, trial: Trial, state: State, value: float | None = None) -> None:
        """What came of a trial."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        named = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}[state]

        def write() -> None:
            # Where the answer of an attempt before was lost, it is written already.
            with contextlib.suppress(UpdateFinishedTrialError):
                self._storage.set_trial_state_values(trial.id, named, None if value is None else [value])

        self._written(write)
        trial.state, trial.value = state, value

    def stops(self, trial: Trial, step: int, config: SearchConfig) -> bool:
        """Whether a trial is given up after this epoch: its best epoch so far is below the median of complete trials' there.

        On few valid images shares of right answers are often equal, and then the loss decides; Optuna's own pruner knows one
        value, and would stop none of these.
        """
        if config.pruner == "none" or step <= config.warm_up_epochs:
            return False
        others = [one for one in self.trials if one.state == "complete" and step in one.curve]
        if len(others) < config.startup_trials:
            return False
        ranks = sorted(one.rank(step, self.direction) for one in others)
        return trial.rank(step, self.direction) < ranks[(len(ranks) - 1) // 2]

    def propose(self, space: Space, config: SearchConfig) -> dict[str, Value]:
        """The values of the next trial, as `proposal` finds them."""
        return proposal(self.trials, self.direction, space, config)

    def importances(self, parameters: Sequence[Parameter]) -> dict[str, float]:
        """By parameter, how much of what differs between trials goes with it (PED-ANOVA); empty with too few trials."""
        complete = [trial for trial in self.trials if trial.state == "complete"]
        if len(complete) < FEWEST or len({trial.value for trial in complete}) < 2:
            return {}
        from optuna.importance import get_param_importances

        with _quietly():
            study = _copy(complete, self.direction, parameters)
            return {key: float(value) for key, value in get_param_importances(study).items()}

    @property
    def best(self) -> Trial | None:
        """The complete trial that is best in the objective; of equal ones that of the lowest valid loss, then the first."""
        complete = [trial for trial in self.trials if trial.state == "complete" and trial.value is not None]
        sign = -1.0 if self.direction == "maximize" else 1.0
        return min(complete, key=lambda one: (sign * (one.value or 0.0), one.loss, one.number), default=None)

    def digest(self, num_trials: int | None = None) -> str:
        """sha256 of what was searched and of what became of the first trials, all of them by default."""
        told = [
            [trial.number, trial.params, trial.state, trial.value, trial.facts.get("weights", "")]
            for trial in self.trials[:num_trials]
        ]
        return sha256_text(canonical_json([self.identity, told]))

    def _attribute(self, key: str) -> Any:
        return self._asked(lambda: self._storage.get_study_user_attrs(self._id)).get(key)

    def _read(self) -> None:
        found = self._asked(lambda: self._storage.get_all_trials(self._id))
        self.trials = [_trial(one) for one in found]
        self.identity = self._attribute(_IDENTITY) or {}
        directions = self._asked(lambda: self._storage.get_study_directions(self._id))
        self.direction = "maximize" if directions[0].name == "MAXIMIZE" else "minimize"

    @property
    def _of_another(self) -> str:
        return f"another search wrote into study {self.name!r} meanwhile; wait for that one to end, or stop it"

    def _written(self, call: Callable[[], T]) -> T:
        """What a call answers that writes; asked each time whether the study is held, also after the database was away."""
        from optuna.exceptions import UpdateFinishedTrialError

        def held() -> T:
            self.hold.expect(self.name)
            return call()

        try:
            return self._asked(held)
        except UpdateFinishedTrialError:
            raise StudyBusy(self._of_another) from None

    def _asked(self, call: Callable[[], T]) -> T:
        return _asked(self.url, call, say=self._say, patience_s=self._patience_s)


def proposal(trials: Sequence[Trial], direction: Direction, space: Space, config: SearchConfig) -> dict[str, Value]:
    """The values of the trial after these; not those of one of them, as long as others are found."""
    number, seen = len(trials), [trial.params for trial in trials]
    first = _one_at_a_time(space, config, number) if config.one_at_a_time else None
    if first is not None and first not in seen:
        return first
    for attempt in range(_REDRAWS):
        found = _drawn(trials, direction, space, config, number, attempt)
        if found not in seen:
            break
    return found


def _expect_same(name: str, known: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise ConfigError where a study is one of another search, saying what differs."""
    if not known:
        raise ConfigError(f"study {name!r} holds trials that are not of visionloop; name another: --study NAME")
    differs = [part for part in asked if known.get(part) != asked[part]]
    if not differs:
        return
    told = "; ".join(f"{part}: {_short(known.get(part))}, now {_short(asked[part])}" for part in differs)
    raise ConfigError(
        f"study {name!r} is of another search, and trials that differ in more than what is searched cannot be compared "
        f"({told}). Name a new study: --study {name}-2; or go back to what it was searched with"
    )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else canonical_json(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({sha256_text(text)[:8]})"


def _storage(url: str) -> RDBStorage:
    """Optuna's tables, made on first use; raises ConfigError for an address that names no database."""
    import optuna
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if url.startswith("sqlite"):
        options: dict[str, Any] = {"connect_args": {"timeout": 60}}
    else:
        # libpq waits for ever for a server that accepts a connection and then says nothing.
        options = {"connect_args": {"connect_timeout": 10}, "pool_pre_ping": True}
    try:
        return RDBStorage(url, engine_kwargs=options)
    except (ArgumentError, NoSuchModuleError, ImportError, TypeError) as error:
        raise ConfigError(f"VISIONLOOP_STUDIES: {scheme(url)} is no database that can be opened here ({error})") from None


def _asked(url: str, call: Callable[[], T], *, say: Say = silent, patience_s: float = PATIENCE_S) -> T:
    """What the database answers, asked again while it is away; raises RegistryUnavailable after a while."""
    from optuna.exceptions import DuplicatedStudyError, StorageInternalError
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

    until, waiting = time.monotonic() + patience_s, False
    while True:
        try:
            found = call()
            if waiting:
                say("    the database of studies answers again")
            return found
        except (ArgumentError, NoSuchModuleError, DuplicatedStudyError):
            raise
        except (StorageInternalError, SQLAlchemyError, RegistryUnavailable) as error:
            cause = _cause(error)
            if time.monotonic() >= until or "is full" in cause or "readonly" in cause:
                raise RegistryUnavailable(
                    f"the database of studies at {redacted(url)} does not answer: {cause}. Nothing was lost; "
                    f"{advice(cause)} and run the same command again, it goes on where it stopped"
                ) from error
            if not waiting:
                say(f"    the database of studies does not answer ({cause}); waiting for it, up to {patience_s:g} s")
            waiting = True
            time.sleep(min(2.0, max(0.05, patience_s / 10)))


def _cause(error: BaseException) -> str:
    """The first line of what the driver said."""
    while error.__cause__ is not None:
        error = error.__cause__
    original = getattr(error, "orig", None)
    return in_short(original or error).partition(": ")[2] or in_short(error)


def _trial(frozen: FrozenTrial) -> Trial:
    states: dict[str, State] = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
    state = states.get(frozen.state.name, "running")
    value = frozen.value if state == "complete" else None
    curve = dict(sorted(frozen.intermediate_values.items()))
    return Trial(
        frozen.number, frozen._trial_id, dict(frozen.params), state, value, curve, dict(frozen.user_attrs.get(_FACTS, {}))
    )


def _frozen(trial: Trial, distributions: Mapping[str, BaseDistribution]) -> FrozenTrial:
    """As Optuna's samplers and pruners take it."""
    from optuna.trial import FrozenTrial, TrialState

    names = {"running": "RUNNING", "complete": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}
    now = datetime.now(UTC).replace(tzinfo=None)
    return FrozenTrial(
        number=trial.number,
        trial_id=trial.number,
        state=TrialState[names[trial.state]],
        value=trial.value,
        datetime_start=now,
        datetime_complete=now if trial.finished else None,
        params=dict(trial.params),
        distributions={key: distributions[key] for key in trial.params},
        user_attrs={},
        system_attrs={},
        intermediate_values=dict(trial.curve),
    )


def _copy(trials: Sequence[Trial], direction: Direction, parameters: Sequence[Parameter]) -> OptunasStudy:
    """A study in memory that holds these trials."""
    import optuna

    known = _distributions(parameters)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction=direction)
    for trial in trials:
        study._storage.create_new_trial(study._study_id, template_trial=_frozen(trial, known))
    return study


def _distributions(parameters: Sequence[Parameter]) -> dict[str, BaseDistribution]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, BaseDistribution] = {}
    for one in parameters:
        if one.kind == "choice":
            found[one.key] = CategoricalDistribution(one.labels)
        elif one.kind == "int":
            found[one.key] = IntDistribution(int(one.low), int(one.high), log=one.dimension.log, step=int(one.step or 1))
        else:
            found[one.key] = FloatDistribution(one.low, one.high, log=one.dimension.log, step=one.dimension.step)
    return found


def _seed(*parts: object) -> int:
    return int(hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:8], 16)


def _drawn(
    trials: Sequence[Trial], direction: Direction, space: Space, config: SearchConfig, number: int, attempt: int = 0
) -> dict[str, Value]:
    """What the sampler draws for a trial after these, from a generator of this trial's own."""
    from optuna.samplers import RandomSampler, TPESampler

    seed = _seed(config.seed, number, attempt)
    study = _copy(trials, direction, space.parameters)
    with _quietly():
        study.sampler = (
            RandomSampler(seed=seed) if config.sampler == "random" else TPESampler(seed=seed, n_startup_trials=_STARTUP)
        )
        return dict(study.ask(_distributions(space.parameters)).params)


def _one_at_a_time(space: Space, config: SearchConfig, number: int) -> dict[str, Value] | None:
    """The recipe's own values, or these with one of them changed; None after that.

    Where the space does not hold the recipe's own values, others are drawn in their place.
    """
    if number > len(space.parameters):
        return None
    random = config.model_copy(update={"sampler": "random"})
    origin = space.own or _drawn((), "maximize", space, random, 0)
    if number == 0:
        return origin
    key = space.parameters[number - 1].key
    for attempt in range(_REDRAWS):
        found = _drawn((), "maximize", space, random, number, attempt)[key]
        if found != origin[key]:
            return {**origin, key: found}
    return None


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without Optuna's remarks on what is experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
