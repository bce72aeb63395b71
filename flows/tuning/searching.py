"""A search that goes on: its study is opened and held, trials are proposed, trained and told."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from components import plugins
from components.contracts.data import DataVersion, Splits
from components.contracts.errors import ConfigError, WorkerLost
from components.contracts.progress import Progress
from components.contracts.records import Stored, canonical_json
from components.contracts.wording import counted
from components.distillation import stored_checkpoint
from components.segments import limit
from components.store import sha256_file
from components.training import local_weights, on_this_machine
from flows import stopping
from flows.terminal import Console
from flows.training import keys
from flows.training.chosen import ChosenRecipe
from flows.training.run import Run
from flows.tuning.alarms import Alarm, alarms
from flows.tuning.attempts import ATTEMPTS, Attempts
from flows.tuning.holding import holding
from flows.tuning.recording import Recorder
from flows.tuning.space import Space, Value, described, searched, space_of, told
from flows.tuning.study import Direction, Study, Trial
from flows.tuning.trial import LOCKS, Place, TrialResult
from flows.tuning.winner import expect_free, winner_name
from flows.tuning.workers import Worker, WorkerEnded, expect_trainers, workers
from flows.workspace.data import ensure
from flows.workspace.desk import artifacts_of
from flows.workspace.settings import read_settings
from flows.workspace.workspace import lock_digest

STAGES = 3
"""Validation, splitting and the trials."""
BEST = "best"
"""The link in a study's folder to what its best trial trained."""
_ATTEMPTS = 3
"""Processes that a trial may cost without coming to a further epoch, before it is given up."""
_GIVEN_UP = 3
"""Trials in a row that may be given up so, before the search ends: that is the machine then, and not what they try."""


@dataclass(frozen=True)
class Asked:
    """What a person asked for beside the recipe."""

    study: str
    workers: int = 1
    write: str = ""
    """Name of the recipe that the winner becomes."""
    ray: bool = False
    """Whether the workers are on a Ray cluster."""


@dataclass
class Search:
    """A study that this process holds, and the run whose data its trials share."""

    run: Run
    space: Space
    study: Study
    asked: Asked
    recorder: Recorder | None = None
    new: int = 0
    """Trials that ended in this process."""

    @property
    def headline(self) -> str:
        return self.run.task.headline

    @property
    def alarms(self) -> list[Alarm]:
        return alarms(self.study.trials, self.space.parameters)

    def link_best(self) -> None:
        """Let the study's folder reach what the best trial trained, so that nothing collects it."""
        best = self.study.best
        artefact = str(best.facts.get("artefact") or "") if best is not None else ""
        if best is None or not artefact:
            return
        trained = self.run.store.folder("training", artefact)
        if trained.is_dir():
            self.run.link(trained, BEST)
            return
        (self.run.folder / BEST).unlink(missing_ok=True)
        self.run.console.line(
            f"    what the best trial so far, {best.number}, trained is not in the store of this workspace any more; "
            f"`visionloop train` by the winner's recipe makes it anew"
        )


@contextlib.contextmanager
def opened(recipe: ChosenRecipe, asked: Asked, *, quiet: bool) -> Iterator[Search]:
    """A search whose space is checked, whose workspace and study are held, and whose data are the pinned ones."""
    workspace, settings = recipe.workspace, read_settings(recipe.workspace.state)
    space = space_of(recipe)
    config = searched(recipe.config)
    # Before data are fetched for trainings that cannot be.
    expect_trainers(recipe.config.training, settings, asked.workers, ray=asked.ray)
    expect_free(workspace.root, winner_name(recipe.config, asked.write), asked.study)
    with workspace.locked(f"visionloop tune {recipe.name}"), Console(STAGES, quiet=quiet) as console:
        limit(workspace.cache, settings.cache_bytes)
        data = ensure(workspace, recipe.config.source, recipe.config.source_settings)
        folder = workspace.studies / asked.study
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(workspace.studies / LOCKS, ignore_errors=True)
        study = Study(settings.studies_url, asked.study, say=console.line)
        direction: Direction = "maximize" if config.objective == "headline" else "minimize"
        with holding(settings.studies_url, asked.study) as hold:
            study.hold = hold
            study.begin(identity(space, data), direction)
            run = Run(workspace, recipe.config, data, settings, console, folder=folder)
            console.line(
                f"study {asked.study}: recipe {recipe.config.name}, {described(space)}, "
                f"{counted(config.trials, 'trial')} by {config.sampler}, {_before(study)}"
            )
            recorder = Recorder(
                study, recipe.config.model, settings.tracking_uri, artifacts_of(workspace, settings), console.line
            )
            done = False
            try:
                with stopping.at_once(
                    lambda: f"stopped; the same command goes on with {_next(study)}",
                    # That a person stopped it says nothing of a trial.
                    lambda _: (folder / ATTEMPTS).unlink(missing_ok=True),
                ):
                    yield Search(run, space, study, asked, recorder)
                done = True
            finally:
                recorder.close(done=done)


def _before(study: Study) -> str:
    finished = sum(trial.finished for trial in study.trials)
    return f"{finished} of them done before" if finished else "none of them done before"


def _next(study: Study) -> str:
    going_on = [trial.number for trial in study.trials if not trial.finished]
    return f"trial {min(going_on, default=len(study.trials))}"


def identity(space: Space, data: DataVersion) -> dict[str, str]:
    """All that the trials of a study have in common, by name: what differs in it cannot be compared."""
    config = space.recipe.config.to_run
    search = searched(space.recipe.config).to_json()
    source = plugins.source_digest(plugins.home("tasks") / "training.py")
    return {
        "model": config.model,
        **{f"section {name}": getattr(config, name).digest()[:16] for name in ("validation", "splitting", "training")},
        **{key: canonical_json(search[key]) for key in sorted(search) if key not in ("trials", "schema_version")},
        "data version": data.dvc_hash,
        "what is pinned beside the data": data.digest()[:16],
        "device": on_this_machine(config.training).key or "cpu",
        "code of the training": source[:16],
        **_named(space),
        "locked libraries": lock_digest()[:16],
    }


def _named(space: Space) -> dict[str, str]:
    """Digests of what the trainings only name: files of weights, teachers, and the code of plug-ins."""
    root = space.recipe.workspace.root
    weights: dict[str, str] = {}
    teachers: dict[str, str] = {}
    code: dict[str, str] = {}
    for config in space.trainings:
        code |= keys.training_members(config)
        local = local_weights(config, root)
        if local is not None:
            weights[config.weights] = sha256_file(local)
        if config.teacher is not None:
            teacher = stored_checkpoint(root / config.teacher.checkpoint)[0].record
            teachers[config.teacher.checkpoint] = teacher.digest()
            code |= keys.member_digests(backbones=teacher.backbone)
    # MLflow takes these names, and takes no path in one.
    files = {"files of weights": weights, "teachers": teachers}
    return {
        **{f"code of {member}": digest[:16] for member, digest in sorted(code.items())},
        **{
            what: ", ".join(f"{path} {digest[:16]}" for path, digest in sorted(found.items()))
            for what, found in files.items()
            if found
        },
    }


def _described(search: Search, splits: Splits) -> dict[str, Any]:
    """What a page needs to know beside the trials."""
    config = search.space.recipe.config
    return {
        "recipe": config.name,
        "headline": search.headline,
        "num_valid": splits.counts["valid"],
        "training": config.training.to_json(),
        "parameters": [
            {"key": one.key, "kind": one.kind, "own": one.own, "dimension": one.dimension.to_json()}
            for one in search.space.parameters
        ],
    }


def tried(search: Search, splits: Stored[Splits]) -> Trial:
    """Train trials until there are as many as were asked for, or none is left to try; returns the best one.

    Raises ConfigError where none of them came to its end, and what no trial is to blame for.
    """
    search.study.expect_splits(splits.record.digest())
    search.study.describe(_described(search, splits.record))
    run, config = search.run, searched(search.space.recipe.config)
    search.link_best()  # a search that was killed may have had no time to
    with run.console.stage("trials", STAGES) as (progress, cached):
        going_on = _Going(search, config.trials, progress)
        if going_on.left:
            with _trainers(search, splits) as found:
                going_on.with_all(found)
        elif not search.new:
            cached.append(True)
    return _expect_some(search.study)


def _trainers(search: Search, splits: Stored[Splits]) -> contextlib.AbstractContextManager[list[Worker]]:
    """Who trains: on a cluster each has as many threads as this process may use, here they share these."""
    run, count = search.run, search.asked.workers
    if search.asked.ray:
        from flows.tuning.cluster import cluster

        place = Place.of(run, splits, run.settings.num_threads)
        return cluster(run.settings.ray_address, place, count, run.console.line)
    return workers(Place.of(run, splits, max(1, run.settings.num_threads // count)), count, run.console.line)


def _expect_some(study: Study) -> Trial:
    if study.best is None:
        reasons: dict[str, list[int]] = {}
        for trial in study.trials:
            reasons.setdefault(str(trial.facts.get("reason", trial.state)), []).append(trial.number)
        said = "; ".join(f"{_numbers(numbers)}: {reason}" for reason, numbers in list(reasons.items())[:3])
        raise ConfigError(
            f"none of the {counted(len(study.trials), 'trial')} of study {study.name!r} came to its end, so there is no "
            f"winner ({said})"
        )
    return study.best


def _numbers(numbers: Sequence[int]) -> str:
    return f"trial{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:5]))}" + (
        ", ..." if len(numbers) > 5 else ""
    )


class _Going:
    """Hands trials to workers and writes down what they tell; one of its threads is at work at a time."""

    def __init__(self, search: Search, wanted: int, progress: Progress) -> None:
        self.search, self.wanted, self.progress = search, wanted, progress
        self._config = searched(search.space.recipe.config)
        self._lock = threading.RLock()
        self._held: set[int] = set()
        self._stopped = False
        self._warm = threading.Event()
        """Set when caches that trials share are filled: two that start at once would both fill them."""
        self._alarmed: set[str] = set()
        self._attempts = Attempts(search.run.folder)
        self._given_up: list[int] = []
        """Trials whose processes were lost, since another one was heard of."""
        if any(trial.curve for trial in search.study.trials):
            self._warm.set()

    @property
    def left(self) -> bool:
        """Whether a trial is to be trained."""
        study = self.search.study
        return any(not trial.finished for trial in study.trials) or self._room

    @property
    def _room(self) -> bool:
        """Whether another trial may begin: not when there are enough, nor when all that there is was tried."""
        trials = self.search.study.trials
        if len(trials) >= self.wanted:
            return False
        return len({canonical_json(trial.params) for trial in trials}) < self.search.space.size

    def with_all(self, found: Sequence[Worker]) -> None:
        """Let the workers train until nothing is left; raises what ends a search."""
        if len(found) == 1:
            self._work(found[0], first=True)
            return
        with ThreadPoolExecutor(len(found), "trials") as pool:
            working = [pool.submit(self._work, worker, first=number == 0) for number, worker in enumerate(found)]
            ended, _ = wait(working, return_when=FIRST_EXCEPTION)
            failed = next((one for one in ended if one.exception() is not None), None)
            if failed is not None:
                self._stopped = True
                self._warm.set()
                for worker in found:
                    close = getattr(worker, "close", None)
                    if close is not None:
                        close()
                failed.result()

    def _work(self, worker: Worker, *, first: bool) -> None:
        if not first:
            self._warm.wait()
        while (trial := self._next()) is not None:
            self._train(worker, trial)
        self._warm.set()

    def _next(self) -> Trial | None:
        """What a killed search left, then new ones."""
        with self._lock:
            if self._stopped:
                return None
            study = self.search.study
            left = next((one for one in study.trials if not one.finished and one.number not in self._held), None)
            if left is None and self._room:
                params = study.propose(self.search.space, self._config)
                left = study.start(params, self.search.space, self._facts(params))
            if left is not None:
                self._held.add(left.number)
            return left

    def _facts(self, params: Mapping[str, Value]) -> dict[str, Any]:
        """What a page shows of a trial although the recipe may have changed by then."""
        with contextlib.suppress(ConfigError):  # told when it is its turn
            return {"training": self.search.space.config(params).training.to_json()}
        return {}

    def _train(self, worker: Worker, trial: Trial) -> None:
        try:
            config = self.search.space.config(trial.params)
        except ConfigError as error:
            self._done(trial, TrialResult(state="failed", reason=str(error)))
            return
        why, number, lost = "the process of the search ended while it was trained", trial.number, False
        while self._attempts.of(number) < _ATTEMPTS:
            self._attempts.begin(number)
            try:
                result = worker.train(number, config, lambda row: self._epoch(trial, row), self._told(trial))
            except (WorkerEnded, WorkerLost) as ended:
                if self._stopped:
                    break
                why, lost = str(ended), True
                again = self._attempts.of(number) < _ATTEMPTS
                then = "another one goes on with it" if again else f"it is given up, after {_ATTEMPTS} of them"
                self.search.run.console.line(f"    trial {number}: {ended}; {then}")
            except BaseException:
                self._attempts.forget(number)
                raise
            else:
                self._attempts.forget(number)
                self._machine_works()
                self._done(trial, result)
                return
        self._attempts.forget(number)
        if self._stopped:  # what ended it is the end of the search
            return
        reason = f"{why}, {_ATTEMPTS} times without coming to a further epoch"
        with self._lock:
            if lost:
                self._given_up.append(number)
            if lost and len(self._given_up) >= _GIVEN_UP:
                raise WorkerLost(
                    f"the last {_numbers(self._given_up)} lost every process (the last one: {reason}), so that it is the "
                    f"machine rather than the values; see what ends them, and run the same command again: it goes on with "
                    f"trial {number}"
                )
        self._done(trial, TrialResult(state="failed", reason=reason))

    def _machine_works(self) -> None:
        with self._lock:
            self._given_up.clear()

    def _told(self, trial: Trial) -> Progress:
        def told_of(done: int, total: int, note: str = "") -> None:
            self._show(f"trial {trial.number}: {note or f'{done}/{total}'}")

        return told_of

    def _show(self, note: str) -> None:
        study = self.search.study
        best = study.best
        finished = sum(one.finished for one in study.trials)
        beside = f"; best {self._value(best)} (trial {best.number})" if best is not None else ""
        self.progress(finished, self.wanted, f"{finished} of {self.wanted} trials; {note}{beside}")

    def _value(self, trial: Trial) -> str:
        named = self.search.headline if self._config.objective == "headline" else "loss"
        return f"valid {named} {trial.value:.4f}" if trial.value is not None else trial.state

    def _epoch(self, trial: Trial, row: Mapping[str, float]) -> bool:
        """Whether a trial goes on after an epoch."""
        phases = len(self.search.space.recipe.config.training.all_phases)
        self._machine_works()
        self._attempts.heard(trial.number, int(row["epoch"]))
        if row.get("phase", 1) < phases:
            return not self._stopped
        with self._lock:
            study = self.search.study
            if "first_epoch" not in trial.facts:
                # Phases before may have been of other lengths in other trials. A training that is taken up tells all epochs.
                study.note(trial, first_epoch=int(row["epoch"]))
            step = int(row["epoch"]) - int(trial.facts["first_epoch"]) + 1
            self._warm.set()
            study.report(trial, step, row[self._reported], row["valid_loss"])
            return not self._stopped and not study.stops(trial, step, self._config)

    @property
    def _reported(self) -> str:
        return f"valid_{self.search.headline}" if self._config.objective == "headline" else "valid_loss"

    def _done(self, trial: Trial, result: TrialResult) -> None:
        with self._lock:
            if self._stopped:
                return
            study, number = self.search.study, len(self.search.space.recipe.config.training.all_phases)
            last = [row for row in result.history if row.get("phase", 1) == number]
            facts = result.to_json()
            del facts["state"], facts["schema_version"]
            study.note(trial, **facts)
            value: float | None = None
            if result.state == "complete":
                for step, row in enumerate(last, 1):  # of what was trained before nobody was told
                    if step not in trial.curve:
                        study.report(trial, step, row[self._reported], row["valid_loss"])
                headline = self._config.objective == "headline"
                value = result.valid[self.search.headline] if headline else min(row["valid_loss"] for row in last)
            study.finish(trial, result.state, value)
            if study.best is trial:
                self.search.link_best()
            self.search.new += 1
            if self.search.recorder is not None:
                self.search.recorder.more()
            self._warm.set()
            self._say(trial, result)

    def _say(self, trial: Trial, result: TrialResult) -> None:
        study, console = self.search.study, self.search.run.console
        came_to = {
            "complete": self._value(trial),
            "pruned": f"stopped after epoch {max(trial.curve, default=0)} of its last phase",
            "failed": f"failed: {result.reason}",
        }[result.state]
        best = study.best
        beside = " (the best so far)" if best is trial else ""
        took = "trained before" if result.cached else f"{result.seconds:.1f} s"
        console.line(
            f"    trial {trial.number} of {self.wanted}: {came_to}{beside}, {took}; "
            f"{told(self.search.space.parameters, trial.params)}"
        )
        for alarm in self.search.alarms:
            if alarm.key not in self._alarmed:
                self._alarmed.add(alarm.key)
                console.line(f"    ALARM: {alarm.text}")
        self._show(f"trial {trial.number} ended")
