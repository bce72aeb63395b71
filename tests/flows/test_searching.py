"""What a search proposes, stops and writes down, on a formula in place of a training."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from failpoints import Died, Failpoints
from safetensors.torch import save_file
from searched import SPACE, Formula, go, recipe_of, searching, told
from shapes import visionloop

from components import plugins
from components.backbones import small_cnn
from components.contracts.errors import (
    ConfigError,
    RegistryUnavailable,
    StoreError,
    StudyBusy,
    UnknownName,
    WorkerLost,
)
from flows.training.chosen import ChosenRecipe
from flows.tuning import holding
from flows.tuning import searching as searching_module
from flows.tuning import study as studies
from flows.tuning.alarms import alarms
from flows.tuning.past import shown_study
from flows.tuning.searching import identity
from flows.tuning.space import Space, Value, space_of
from flows.tuning.study import Study, Trial
from flows.tuning.trial import TrialResult
from flows.tuning.workers import Process, WorkerEnded
from flows.workspace.recipes import RunConfig, load_recipe
from flows.workspace.settings import began, read_settings, sqlite_url
from flows.workspace.workspace import Workspace


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("{}", "search.space: it is empty, so there is nothing to search"),
        ("{training.fit.learning_rat: {low: 1, high: 2}}", "'training.fit.learning_rat'; valid: batch_size, checkpoint"),
        (
            "{training.phases.2.fit.epochs: {low: 1, high: 2}}",
            "refused by the recipe 'smoke': training.phases: Input should be a valid array",
        ),
        ("{training.fit.learning_rate: {low: 0.1, high: 0.01}}", "low is 0.1 and high is 0.01; low has to be below high"),
        ("{training.fit.learning_rate: {low: 0.0, high: 0.01, log: true}}", "log needs a low above 0"),
        ("{training.fit.learning_rate: {low: 0.0, high: 0.01}}", "learning_rate: 0.0 is refused by the recipe 'smoke'"),
        ("{training.fit.learning_rate: {low: 0.01}}", "it needs low and high, or choices"),
        ("{training.fit.learning_rate: {low: 0.1, high: 0.2, lg: true}}", "learning_rate.lg'; valid: choices, high, log"),
        ("{training.fit.epochs: {low: 1, high: 6, step: 2}}", "from 1 in steps of 2 6 is never reached"),
        ("{training.fit.epochs: {low: 1, high: 2, step: 5}}", "step is 5, which is more than lies between"),
        ("{training.backbone: {choices: [small_cnn, resnet999]}}", "unknown backbone 'resnet999'; valid: efficientnet"),
        ("{training.backbone: {choices: [small_cnn]}}", "small_cnn alone leaves nothing to choose"),
        ("{training.fit.batch_size: {choices: [8, 8]}}", "8 is there twice"),
        ("{training.fit.batch_size: {choices: [8, 16], low: 1}}", "give a range or choices, not both"),
        ("{training.backbone_settings.depth: {low: 1, high: 2}}", "unknown setting of backbone 'small_cnn' 'depth'; valid:"),
        ("{training.fit.step_factor: {low: 0.2, high: 0.3}}", "step_factor has an effect with schedule: step"),
        ("{gating.gates: {low: 1, high: 2}}", "gating.gates is no key of training"),
        (
            "{training.compute.accumulate: {choices: [1, 2]}}",
            "changes how fast a training is, and nothing of what it learns",
        ),
        ("{training.fit.seed: {low: 1, high: 9}}", "only choose the luckiest draw"),
        ("{training.task: {choices: [classification, other]}}", "changes what the valid loss means"),
        (
            "{training.weights: {choices: [random, champion]}}",
            "weights: champion is refused by the recipe 'smoke': training.weights: champion: trials of a search have to begin",
        ),
        (
            "{training.teacher: {choices: [{checkpoint: a}, {champion: b}]}}",
            "is refused by the recipe 'smoke': training.teacher: champion: trials of a search have to learn from the same",
        ),
    ],
)
def test_what_cannot_be_searched_is_refused_before_any_trial(tmp_path: Path, space: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        space_of(recipe_of(tmp_path, f"search: {{space: {space}}}\n"))
    assert message in str(caught.value)


_SEARCH = "{space: {training.phases.0.fit.learning_rate: {low: 0.001, high: 0.01}}}"


def test_a_recipe_without_a_search_says_what_one_looks_like(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no section search.*learning_rate: {low: 0.0001"):
        space_of(recipe_of(tmp_path, ""))
    smoothing = "search: {objective: valid_loss, space: {training.task_settings.label_smoothing: {low: 0.0, high: 0.2}}}\n"
    with pytest.raises(ConfigError, match="label_smoothing changes what the valid loss means.*objective: headline"):
        recipe_of(tmp_path, smoothing)
    with pytest.raises(ConfigError, match="a search compares trainings by epochs on the valid images"):
        space_of(ChosenRecipe(Workspace(tmp_path), "fewshot", (), load_recipe("fewshot", [f"search={_SEARCH}"])))
    with pytest.raises(ConfigError, match="the same teacher, and the champion may change"):
        space_of(ChosenRecipe(Workspace(tmp_path), "distil", (), load_recipe("distil", [f"search={_SEARCH}"])))
    with pytest.raises(ConfigError, match="begin from the same weights, and the champion may"):
        space_of(recipe_of(tmp_path, SPACE, "training.weights=champion"))


def test_a_space_knows_kinds_and_the_recipes_own_values(tmp_path: Path) -> None:
    space = space_of(
        recipe_of(
            tmp_path,
            """
search:
  space:
    training.fit.clip_norm: {low: 0, high: 2}
    training.fit.ema_decay: {low: 0, high: 0.6, step: 0.1}
    training.fit.epochs: {low: 2, high: 8, step: 2}
    training.backbone_settings.width: {low: 4, high: 12}
    training.fit.schedule: {choices: [cosine, one_cycle]}
    training.fit.batch_size: {choices: [32, 64]}
""",
        )
    )
    assert [(one.kind, one.own, one.size) for one in space.parameters] == [
        ("float", 0.0, float("inf")),
        ("float", 0.0, 7),
        ("int", 6, 4),
        ("int", 8, 9),
        ("choice", "cosine", 2),
        ("choice", None, 2),
    ]
    assert space.own is None  # the recipe's batch is not in the space
    chosen = space.config(
        {
            "training.fit.clip_norm": 0.5,
            "training.fit.ema_decay": 0.3,
            "training.fit.epochs": 4,
            "training.backbone_settings.width": 5,
            "training.fit.schedule": "one_cycle",
            "training.fit.batch_size": "64",
        }
    ).training
    assert (chosen.fit.clip_norm, chosen.fit.epochs, chosen.fit.batch_size) == (0.5, 4, 64)
    assert (chosen.fit.schedule, chosen.backbone_settings["width"]) == ("one_cycle", 5)


def test_a_search_says_nothing_of_what_a_run_makes(tmp_path: Path) -> None:
    plain = recipe_of(tmp_path, "").config
    searched = recipe_of(tmp_path, SPACE).config
    assert plain == searched.to_run
    assert "search" not in plain.to_json()
    assert "tuned" not in plain.to_json()
    assert plain.digest() == searched.to_run.digest() != searched.digest()


def test_the_schema_shows_the_bounds_of_what_can_be_searched() -> None:
    done = visionloop("recipe", "schema", cwd=Path.cwd())
    definitions = json.loads(done.stdout)["$defs"]
    of_passes = definitions["ChosenPass"]["properties"]["settings"]["bounds"]
    assert of_passes["settings.limit"] == "a number from 0 to 1 (with pass quantisation_aware)"
    search = definitions["SearchConfig"]["properties"]
    assert search["trials"]["minimum"] == 1
    assert "median" in search["pruner"]["description"]
    bounds = search["space"]["bounds"]
    assert bounds["training.phases.N.fit.learning_rate"] == "a number above 0 to 1e+30"
    assert bounds["training.phases.N.fit.batch_size"] == "a whole number from 1 to 65536"
    assert bounds["training.phases.N.trains"].startswith("head, all, or {last: K}")
    assert "efficientnet_lite0" in bounds["training.backbone"]
    assert bounds["training.phases.N.augmentations.mixup.alpha"].startswith("a number")
    assert "with loss cross_entropy" in bounds["training.phases.N.loss.settings.smoothing"]
    assert bounds["training.phases.N.fit.schedule"] == "one of cosine, constant, step, one_cycle, cyclical"
    assert not [key for key in bounds if key.endswith(".seed")]
    # What it shows as an example can be searched.
    (example,) = search["space"]["examples"]
    assert len(space_of_transfer(example).parameters) == len(example)


def space_of_transfer(space: dict[str, Any]) -> Space:
    config = load_recipe("transfer", [f"search={json.dumps({'space': space})}"])
    return space_of(ChosenRecipe(Workspace(Path.cwd()), "transfer", (), config))


def test_the_first_trials_change_one_thing_at_a_time_and_the_rest_get_better(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    search = searching(tmp_path, recipe)
    go(search, Formula(search.space))
    trials = search.study.trials
    assert len(trials) == 14
    own = {
        "training.fit.learning_rate": 0.01,
        "training.backbone_settings.width": "8",
        "training.augmentation.rotate_degrees": 0.0,
    }
    assert trials[0].params == own
    for parameter, trial in zip(search.space.parameters, trials[1:4], strict=True):
        assert [key for key in own if trial.params[key] != own[key]] == [parameter.key]
    assert len({str(trial.params) for trial in trials}) == 14
    pruned = [trial for trial in trials if trial.state == "pruned"]
    assert pruned
    for trial in pruned:
        # Never in its first epoch, nor before three trials are complete; always behind the median at that epoch.
        last = max(trial.curve)
        before = [one.curve[last] for one in trials[: trial.number] if one.state == "complete"]
        assert last >= 2
        assert len(before) >= 3
        assert max(trial.curve.values()) < sorted(before)[len(before) // 2]
    # Those that went on were never below it.
    for trial in trials[3:]:
        for epoch in range(2, 4) if trial.state == "complete" else ():
            before = [one.curve[epoch] for one in trials[: trial.number] if one.state == "complete"]
            assert max(list(trial.curve.values())[:epoch]) >= sorted(before)[(len(before) - 1) // 2]
    best = search.study.best
    assert best is not None
    assert best.value == max(trial.value or 0 for trial in trials)
    assert len(trials) - len(pruned) < 8
    assert search.study.importances(search.space.parameters) == {}  # too few trials came to their end


def test_of_trials_that_are_equal_those_of_the_higher_loss_are_stopped(tmp_path: Path) -> None:
    search = searching(tmp_path, recipe_of(tmp_path, SPACE, "search.trials=20"))

    class Saturated(Formula):
        """Every trial answers the same number of images right."""

        def train(self, number: int, config: RunConfig, on_epoch: Any, *rest: Any) -> TrialResult:
            result = super().train(number, config, lambda row: on_epoch({**row, "valid_accuracy": 0.99}), *rest)
            return result.model_copy(update={"valid": {"accuracy": 0.99}})

    go(search, Saturated(search.space))
    stopped = [trial for trial in search.study.trials if trial.state == "pruned"]
    assert len(stopped) >= 4
    complete = [trial for trial in search.study.trials if trial.state == "complete"]
    assert min(trial.loss for trial in stopped) > min(trial.loss for trial in complete)
    best = search.study.best
    assert best is not None
    assert best.loss == min(trial.loss for trial in complete)


def test_another_seed_or_sampler_proposes_something_else_and_the_same_ones_the_same(tmp_path: Path) -> None:
    found = []
    for number, overrides in enumerate([(), (), ("search.seed=1",), ("search.sampler=random",)]):
        search = searching(tmp_path, recipe_of(tmp_path, SPACE, *overrides), study=f"s{number}")
        go(search, Formula(search.space))
        found.append([row[1:] for row in told(search)])
    assert found[0] == found[1]
    assert found[2][4:] != found[0][4:]
    # TPE has learned by the end, which random search never does.
    assert found[3][:8] == found[0][:8]
    assert found[3][8:] != found[0][8:]


def test_a_search_that_dies_at_any_write_proposes_and_finds_what_one_that_lives_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optuna.storages import RDBStorage

    recipe = recipe_of(tmp_path, SPACE.replace("trials: 14", "trials: 7"))
    alive = searching(tmp_path / "alive", recipe, url=sqlite_url(tmp_path / "alive.db"))
    go(alive, Formula(alive.space))
    names = ("create_new_trial", "set_trial_intermediate_value", "set_trial_user_attr", "set_trial_state_values")
    deaths = 0
    for when in ("before", "after"):
        url = sqlite_url(tmp_path / f"{when}.db")
        for life in range(400):
            with monkeypatch.context() as patch:
                # A trial takes eight writes at most: every third life or so gets further than the one before.
                nth = 1 + life % 12
                Failpoints([(RDBStorage, name) for name in names], nth=nth, when=when)(patch)
                try:
                    search = searching(tmp_path, recipe, url=url)
                    go(search, Formula(search.space))
                except Died:
                    deaths += 1
                    continue
            break
        assert told(search) == told(alive)
    assert deaths > 20


def test_a_database_that_is_away_for_a_while_is_waited_for_and_one_that_stays_away_ends_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optuna.exceptions import StorageInternalError
    from optuna.storages import RDBStorage

    recipe, lines = recipe_of(tmp_path), []  # type: ignore[var-annotated]
    alive = searching(tmp_path, recipe, study="alive")
    go(alive, Formula(alive.space))
    search = searching(tmp_path, recipe, lines=lines, patience_s=1)
    real, calls = RDBStorage.set_trial_intermediate_value, 0

    def shaky(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls in (5, 6, 7):
            raise StorageInternalError from sqlite3.OperationalError("server closed the connection unexpectedly")
        real(*arguments)
        if calls == 9:  # it was written, and the answer was lost
            raise StorageInternalError from sqlite3.OperationalError("server closed the connection unexpectedly")

    create, made = RDBStorage.create_new_trial, 0

    def lost(*arguments: Any) -> int:
        nonlocal made
        found, made = create(*arguments), made + 1
        if made == 3:
            raise StorageInternalError from sqlite3.OperationalError("server closed the connection unexpectedly")
        return found

    monkeypatch.setattr(RDBStorage, "create_new_trial", lost)
    monkeypatch.setattr(RDBStorage, "set_trial_intermediate_value", shaky)
    go(search, Formula(search.space))
    assert told(search) == told(alive)
    assert [line for line in lines if "answers again" in line]
    assert "server closed the connection unexpectedly" in next(line for line in lines if "does not answer" in line)

    def away(*_: Any) -> None:
        raise StorageInternalError from sqlite3.OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(RDBStorage, "set_trial_state_values", away)
    other = searching(tmp_path, recipe, study="other")
    with pytest.raises(RegistryUnavailable, match="does not answer: server closed.*Nothing was lost.*same command again"):
        go(other, Formula(other.space))
    monkeypatch.undo()
    again = searching(tmp_path, recipe, study="other")
    go(again, Formula(again.space))
    assert told(again) == told(alive)


def test_a_study_on_a_full_disk_says_so_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from optuna.exceptions import StorageInternalError
    from optuna.storages import RDBStorage

    def full(*_: Any) -> None:
        raise StorageInternalError from sqlite3.OperationalError("database or disk is full")

    search = searching(tmp_path, recipe_of(tmp_path), patience_s=3600)
    monkeypatch.setattr(RDBStorage, "create_new_trial", full)
    with pytest.raises(RegistryUnavailable, match="disk is full.*free space on its disk"):
        go(search, Formula(search.space))


def test_a_study_of_another_search_or_data_version_is_refused_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = searching(tmp_path, recipe_of(tmp_path))
    go(search, Formula(search.space))
    for overrides, part in (
        (["training.fit.epochs=9"], "section training: "),
        (["search.sampler=random"], 'sampler: "tpe", now "random"'),
        (["search.seed=4"], "seed: 0, now 4"),
        (["splitting.valid_share=0.2"], "section splitting"),
    ):
        with pytest.raises(ConfigError, match="Name a new study: --study s-2") as caught:
            searching(tmp_path, recipe_of(tmp_path, SPACE, *overrides))
        assert part in str(caught.value)
    known = {**search.study.identity}
    study = Study(search.study.url, "s")
    with pytest.raises(ConfigError, match="data version: dddd.*, now eeee"):
        study.begin(known | {"data version": "e" * 32}, "maximize")
    search.study.expect_splits("a" * 64)
    with pytest.raises(ConfigError, match="other splits of the images"):
        search.study.expect_splits("b" * 64)
    # What a recipe only names is of the search by its content.
    save_file({"x": torch.zeros(3)}, tmp_path / "w.safetensors")
    (tmp_path / "plugins" / "backbones").mkdir(parents=True)
    mine = tmp_path / "plugins" / "backbones" / "mine.py"
    mine.write_text(Path(small_cnn.__file__).read_text())
    teacher = SimpleNamespace(backbone="small_cnn", digest=lambda: "c" * 64)
    monkeypatch.setattr(searching_module, "stored_checkpoint", lambda _: (SimpleNamespace(record=teacher), ""))
    plugins.use_workspace(tmp_path / "plugins")
    named = recipe_of(
        tmp_path,
        SPACE + "    training.weights: {choices: [random, w.safetensors]}\n",
        "training.backbone=mine",
        "training.teacher={checkpoint: t}",
    )
    searching(tmp_path, named, study="named")
    for change, part in (
        (lambda: save_file({"x": torch.ones(3)}, tmp_path / "w.safetensors"), "files of weights: w.safetensors "),
        (lambda: mine.write_text(mine.read_text() + "# changed\n"), "code of backbones/mine: "),
        (lambda: setattr(teacher, "digest", lambda: "e" * 64), "teachers: t cccccccccccccccc, now t eeee"),
    ):
        change()
        plugins.source_digest.cache_clear()
        with pytest.raises(ConfigError, match="Name a new study") as caught:
            searching(tmp_path, named, study="named")
        assert part in str(caught.value)
    assert "code of backbones/small_cnn" in identity(space_of(named), SimpleNamespace(dvc_hash="", digest=str))  # type: ignore[arg-type]
    plugins.use_workspace(None)
    # More trials of the same search are the same search.
    more = searching(tmp_path, recipe_of(tmp_path, SPACE, "search.trials=16"))
    before = more.study.digest()
    worker = Formula(more.space)
    go(more, worker)
    assert worker.trained == [14, 15]
    assert more.study.digest(14) == before != more.study.digest()


def test_trials_that_fail_are_told_and_the_search_goes_on(tmp_path: Path) -> None:
    from flows.tuning.searching import _expect_some

    lines: list[str] = []
    recipe = recipe_of(tmp_path, SPACE.replace("choices: [4, 8, 16]", "choices: [4, 8, 16, 64]"))
    search = searching(tmp_path, recipe, lines=lines)

    class Fragile(Formula):
        def train(self, number: int, *rest: Any) -> TrialResult:
            if number == 2:
                return TrialResult(state="failed", reason="the loss became nan at epoch 1, step 3")
            if number == 3:
                self.trained.append(number)
                raise WorkerEnded("its process was ended by SIGKILL, as the system does where memory is not enough")
            if number == 4:
                raise WorkerLost("a process of the training was killed before its end")
            return super().train(number, *rest)

    worker = Fragile(search.space)
    go(search, worker)
    states = [trial.state for trial in search.study.trials]
    assert (states[2:5], len(states)) == (["failed"] * 3, 14)
    assert worker.trained.count(3) == 3
    assert search.study.trials[2].facts["reason"] == "the loss became nan at epoch 1, step 3"
    assert "SIGKILL" in search.study.trials[3].facts["reason"]
    assert "was killed before its end, 3 times without" in search.study.trials[4].facts["reason"]
    assert [line for line in lines if "trial 2 of 14: failed: the loss became nan" in line]
    assert _expect_some(search.study).state == "complete"

    none = searching(tmp_path, recipe, study="none")

    class Hopeless(Formula):
        def train(self, number: int, *_: Any) -> TrialResult:
            return TrialResult(state="failed", reason="the loss became nan")

    go(none, Hopeless(none.space))
    with pytest.raises(ConfigError, match="none of the 14 trials of study 'none' came to its end.*trials 0, 1.*nan"):
        _expect_some(none.study)

    stopped = searching(tmp_path, recipe, study="stopped")

    class Full(Formula):
        def train(self, number: int, *rest: Any) -> TrialResult:
            if number == 4:
                raise StoreError("no space left to write")
            return super().train(number, *rest)

    with pytest.raises(StoreError):
        go(stopped, Full(stopped.space))
    assert [row[2] for row in told(stopped)][4:] == ["running"]
    again = searching(tmp_path, recipe, study="stopped")
    go(again, Formula(again.space))
    assert "running" not in [row[2] for row in told(again)]


def test_a_machine_that_loses_every_process_ends_the_search_and_mended_it_goes_on(tmp_path: Path) -> None:
    class Broken(Formula):
        def train(self, number: int, *rest: Any) -> TrialResult:
            if number < 2:
                return super().train(number, *rest)
            self.trained.append(number)
            raise WorkerLost("a process of the training ended before its end")

    search = searching(tmp_path, recipe_of(tmp_path))
    broken = Broken(search.space)
    with pytest.raises(WorkerLost, match=r"the last trials 2, 3, 4 lost every process .*it goes on with trial 4"):
        go(search, broken)
    assert broken.trained == [0, 1, *[2] * 3, *[3] * 3, *[4] * 3]
    assert [row[2] for row in told(search)][2:] == ["failed", "failed", "running"]
    again = searching(tmp_path, recipe_of(tmp_path))
    mended = Formula(again.space)
    go(again, mended)
    assert mended.trained == list(range(4, 14))


def test_trials_beside_the_one_that_ends_a_search_keep_their_attempts(tmp_path: Path) -> None:
    """Their third process may be what the end of the search takes: the next search trains them all the same."""
    ended, begun = threading.Event(), Counter[int]()

    class Broken(Formula):
        def train(self, number: int, *rest: Any) -> TrialResult:
            begun[number] += 1
            if number in (3, 4) and begun[number] == 3:
                assert ended.wait(60)
            raise WorkerLost("a process of the training ended before its end")

        def close(self) -> None:
            ended.set()

    search = searching(tmp_path, recipe_of(tmp_path))
    with pytest.raises(WorkerLost, match="lost every process"):
        go(search, *(Broken(search.space) for _ in range(4)))
    left = [trial.number for trial in search.study.trials if not trial.finished]
    assert {3, 4} <= set(left)
    again = searching(tmp_path, recipe_of(tmp_path))
    mended = Formula(again.space)
    go(again, mended)
    assert set(left) <= set(mended.trained)
    assert [trial.state for trial in again.study.trials].count("failed") == len(search.study.trials) - len(left)


def test_a_worker_that_was_closed_starts_no_process_any_more() -> None:
    closed = Process(SimpleNamespace())  # type: ignore[arg-type]
    closed.close()
    with pytest.raises(WorkerEnded, match="the search has ended"):
        closed.train(0, SimpleNamespace(), lambda _: True, lambda *_: None)  # type: ignore[arg-type]
    assert closed.pid is None


def test_what_the_values_do_to_a_trial_is_not_the_machine(tmp_path: Path) -> None:
    """Between two lost ones a trial that failed by its values, or was found, had a process that worked."""

    class Fragile(Formula):
        def train(self, number: int, *rest: Any) -> TrialResult:
            if number % 2:
                return TrialResult(state="failed", reason="the loss became nan at epoch 1, step 3")
            raise WorkerLost("a process of the training ended before its end")

    search = searching(tmp_path, recipe_of(tmp_path))
    go(search, Fragile(search.space))
    assert [trial.state for trial in search.study.trials] == ["failed"] * 14


def test_a_trial_that_ends_the_search_itself_is_given_up_by_the_third_that_takes_it_up(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from searched import Formula, go, recipe_of, searching

class Deadly(Formula):
    def train(self, number, config, on_epoch, progress):
        def heard(row):
            if number == 1 and row["epoch"] == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return on_epoch(row)
        return super().train(number, config, heard, progress)

root = Path(sys.argv[1])
for deaths in range(6):
    child = os.fork()
    if not child:
        search = searching(root, recipe_of(root))
        go(search, Deadly(search.space))
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
print(deaths)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["3"], done.stderr
    trials = searching(tmp_path, recipe_of(tmp_path)).study.trials
    assert [trial.number for trial in trials if trial.state == "failed"] == [1]
    assert len(trials) == 14
    assert "the process of the search ended while it was trained, 3 times" in trials[1].facts["reason"]


def test_values_that_do_not_go_together_fail_alone(tmp_path: Path) -> None:
    text = """
search:
  trials: 4
  space:
    training.fit.schedule: {choices: [cosine, one_cycle]}
    training.fit.warmup_epochs: {low: 1, high: 2, step: 1}
"""
    search = searching(tmp_path, recipe_of(tmp_path, text))
    worker = Formula(search.space, lambda params, epoch: epoch / 10 + len(str(params)) / 1000)
    go(search, worker)
    # There are four combinations and the loop stops there, however many trials are wanted.
    failed = [trial for trial in search.study.trials if trial.state == "failed"]
    assert [trial.params["training.fit.schedule"] for trial in failed] == ["one_cycle"]
    assert "warmup_epochs has an effect with schedule" in failed[0].facts["reason"]
    assert failed[0].number not in worker.trained
    more = searching(tmp_path, recipe_of(tmp_path, text, "search.trials=50"))
    go(more, Formula(more.space))
    assert len(more.study.trials) == 4


def trial(number: int, weights: str, losses: list[float] | None = None, **params: Value) -> Trial:
    history = [{"epoch": at, "train_loss": loss, "valid_loss": loss} for at, loss in enumerate(losses or [0.5], 1)]
    state: Any = "complete" if weights else "pruned"
    return Trial(number, number, dict(params), state, facts={"weights": weights, "history": history})


def test_trials_of_other_values_and_the_same_bits_raise_an_alarm() -> None:
    parameters: Any = [type("P", (), {"key": key})() for key in ("a", "b")]

    def told_of(*trials: Trial) -> list[str]:
        return [alarm.text for alarm in alarms(trials, parameters)]

    fine = [trial(0, "x", a=1.0, b=1.0), trial(1, "y", a=2.0, b=1.0), trial(2, "z", a=1.0, b=2.0)]
    assert told_of(*fine) == []
    assert told_of(fine[0], trial(3, "x", a=1.0, b=1.0)) == []  # the same values come to the same
    (alone,) = told_of(*fine, trial(3, "x", a=1.0, b=7.0))
    assert "b has no effect: trials 0 and 3 differ in it alone (1 and 7) and were trained to the same bits" in alone
    (several,) = told_of(*fine, trial(3, "x", a=5.0, b=7.0))
    assert "trials 0 and 3 differ in a, b and were trained to the same bits" in several
    (every,) = told_of(*(trial(number, "x", a=float(number), b=1.0) for number in range(4)))
    assert "all 4 trials of different values were trained to the same bits: nothing that is searched has an effect" in every
    # What one that was stopped early would have come to, nobody knows: b may be the factor of a later step.
    stopped = trial(4, "", [0.5, 0.4], a=0.0, b=9.0)
    assert told_of(trial(0, "x", [0.5, 0.4, 0.3], a=0.0, b=1.0), stopped) == []
    same = [trial(number, "x", [0.5, 0.4, 0.3], a=float(number), b=1.0) for number in range(4)]
    (alone,) = told_of(*same, stopped)
    assert alone.startswith("a has no effect")


def test_a_parameter_without_effect_is_found_in_a_search(tmp_path: Path) -> None:
    lines: list[str] = []
    search = searching(tmp_path, recipe_of(tmp_path), lines=lines)

    class Ignoring(Formula):
        """Whatever a trial says of rotation does not reach its training."""

        def train(self, number: int, config: RunConfig, *rest: Any) -> TrialResult:
            still = config.training.augmentation.model_copy(update={"rotate_degrees": 0.0})
            training = config.training.model_copy(update={"augmentation": still})
            return super().train(number, config.model_copy(update={"training": training}), *rest)

    go(search, Ignoring(search.space))
    (line,) = [line for line in lines if "ALARM" in line]
    assert "training.augmentation.rotate_degrees has no effect: trials 0 and 3 differ in it alone" in line


def test_two_workers_share_a_study(tmp_path: Path) -> None:
    search = searching(tmp_path, recipe_of(tmp_path))
    found = [Formula(search.space), Formula(search.space)]
    go(search, *found)
    trained = sorted([*found[0].trained, *found[1].trained])
    assert trained == list(range(14))
    assert len({str(row[1]) for row in told(search)}) == 14

    failing = searching(tmp_path, recipe_of(tmp_path), study="failing")

    class Full(Formula):
        def train(self, number: int, *rest: Any) -> TrialResult:
            if number == 3:
                raise StoreError("no space left to write")
            return super().train(number, *rest)

    with pytest.raises(StoreError, match="no space left"):
        go(failing, Full(failing.space), Full(failing.space))


def test_tpe_learns_what_a_formula_rewards(tmp_path: Path) -> None:
    """No promise about trainings: that its proposals follow the values at all."""

    def mean_of_last(sampler: str) -> float:
        values = []
        for seed in range(2):
            overrides = [f"search.sampler={sampler}", f"search.seed={seed}", "search.trials=20", "search.pruner=none"]
            search = searching(tmp_path, recipe_of(tmp_path, SPACE, *overrides), study=f"{sampler}{seed}")
            go(search, Formula(search.space, epochs=1))
            values += [trial.value or 0.0 for trial in search.study.trials[14:]]
        importances = search.study.importances(search.space.parameters)
        assert max(importances, key=lambda key: importances[key]) == "training.fit.learning_rate"
        return sum(values) / len(values)

    assert mean_of_last("tpe") > mean_of_last("random")


def test_shipped_recipes_can_be_searched_and_their_digests_stay() -> None:
    config = load_recipe("transfer")
    assert config.to_run.digest() == "60ffd7c812c6e406cd0f785e2ae2390ea8771866c0576085eead6eea64760ee3"


def test_a_study_is_held_by_one_search_and_given_up_by_one_that_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = sqlite_url(tmp_path / "studies.db")

    def pretend(**values: Any) -> None:
        with sqlite3.connect(tmp_path / "studies.db") as connection:
            for key, value in values.items():
                connection.execute(f"UPDATE visionloop_searches SET {key} = ?", (value,))

    with holding_of(url, "s"), holding_of(url, "other"):
        with pytest.raises(StudyBusy, match="study 's' is searched by the process .* on .*; wait for it to end"):
            take(url, "s")
        # A machine that has this one's name, and began anew or is another one, has other processes of these numbers.
        pretend(began="another-boot:0", pid=1)
        with pytest.raises(StudyBusy):
            take(url, "s")
        # One that was killed on this machine gives way at once.
        pretend(began=f"{(began(os.getpid()) or '').rpartition(':')[0]}:0")
        with holding_of(url, "s"):
            pass
    # One on another machine after a minute without a word.
    with holding_of(url, "s"):
        pretend(host="elsewhere", seen="2026-11-30 10:00:00.000000")
        with holding_of(url, "s"):
            pass
    with holding_of(url, "s"):
        pretend(host="elsewhere")
        with pytest.raises(StudyBusy, match="on elsewhere"):
            take(url, "s")
    # A search that lost its study says so instead of writing into it: before it heard of that,
    recipe = recipe_of(tmp_path)
    with holding_of(url, "lost") as hold:
        lost = searching(tmp_path, recipe, study="lost")
        lost.study.hold = hold

        class TakenOver(Formula):
            def train(self, number: int, config: RunConfig, on_epoch: Any, *rest: Any) -> TrialResult:
                def heard(row: Any) -> bool:
                    if (number, row["epoch"]) == (2, 3):
                        pretend(holder="another")
                    return bool(on_epoch(row))

                return super().train(number, config, heard, *rest)

        with pytest.raises(StudyBusy, match="another search took study 'lost' over"):
            go(lost, TakenOver(lost.space))
        assert [(row[2], list(row[4])) for row in told(lost)] == [*[("complete", [1, 2, 3, 4])] * 2, ("running", [1, 2])]
    # and after.
    monkeypatch.setattr(holding, "BEAT_S", 0.05)
    with holding_of(url, "s") as hold:
        hold.expect("s")
        pretend(holder="another")
        assert hold.lost.wait(20)
        with pytest.raises(StudyBusy, match="another search took study 's' over"):
            hold.expect("s")
        lost = searching(tmp_path, recipe, study="s")
        lost.study.hold = hold
        with pytest.raises(StudyBusy):
            go(lost, Formula(lost.space))
        assert told(lost) == []


def test_what_another_search_wrote_is_never_taken_for_its_own(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    one, other = searching(tmp_path, recipe), searching(tmp_path, recipe)
    assert recipe.config.search is not None
    params = one.study.propose(one.space, recipe.config.search)
    theirs = other.study.start({**params, "training.fit.learning_rate": 0.005}, other.space, {})
    with pytest.raises(StudyBusy, match="another search wrote into study 's'"):
        one.study.start(params, one.space, {})
    taken_up = searching(tmp_path, recipe)
    other.study.finish(theirs, "complete", 0.5)
    with pytest.raises(StudyBusy, match="another search wrote into study 's'"):
        taken_up.study.report(taken_up.study.trials[0], 1, 0.1, 0.2)


def holding_of(url: str, study: str) -> contextlib.AbstractContextManager[holding.Hold]:
    return holding.holding(url, study)


def take(url: str, study: str) -> None:
    with holding_of(url, study):
        pass


def test_a_study_in_postgresql_is_the_same(tmp_path: Path, postgres: str) -> None:
    recipe = recipe_of(tmp_path, SPACE.replace("trials: 14", "trials: 10"))
    found = []
    for url in (postgres, ""):
        search = searching(tmp_path, recipe, url=url)
        go(search, Formula(search.space))
        found.append(told(search))
        assert [head.name for head in studies.heads(search.study.url)] == ["s"]
    assert found[0] == found[1]
    with holding_of(postgres, "s"), pytest.raises(StudyBusy, match="is searched by the process"):
        take(postgres, "s")


def test_a_database_that_cannot_be_opened_is_named_without_its_password_and_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="VISIONLOOP_STUDIES: 'sqlit' is no database that can be opened here"):
        Study("sqlit:///x", "s")
    for url in ("me:secret@host", "me:secret@host://x"):
        with pytest.raises(ConfigError, match="VISIONLOOP_STUDIES: an address without a scheme such as sqlite") as refused:
            Study(url, "s")
        assert "secret" not in str(refused.value)
    away = "postgresql://me:secret@127.0.0.1:9/x"
    for ask in (lambda: Study(away, "s", patience_s=0), lambda: studies.heads(away)):
        with pytest.raises(RegistryUnavailable) as caught:
            ask()
        assert "does not answer" in str(caught.value)
        assert "secret" not in str(caught.value)
    # One that never answered has nothing to come back from.
    (tmp_path / "text").write_text("This is a text, and no database.\n" * 99)
    lines: list[str] = []
    with pytest.raises(RegistryUnavailable, match="file is not a database"):
        Study(sqlite_url(tmp_path / "text"), "s", say=lines.append, patience_s=4)
    assert "waiting for it, up to 2 s" in lines[0]


def test_a_study_that_is_not_there_leaves_no_trace(tmp_path: Path) -> None:
    recipe_of(tmp_path)
    workspace = Workspace(tmp_path)
    with pytest.raises(UnknownName, match="unknown study 'foo'"):
        shown_study(workspace, "foo")
    assert not workspace.state.exists()
    workspace.state.mkdir()
    # Whoever shares the database may have named one like this, and its page is written into a folder of that name.
    searching(tmp_path, recipe_of(tmp_path), study="../evil", url=read_settings(workspace.state).studies_url)
    with pytest.raises(ConfigError, match="'../evil' is not a plain name"):
        shown_study(workspace, "../evil")
