"""The estimate of a recipe from k folds: all images take turns as test images, each of a model that never saw them.

A small project has a frozen test of a few dozen images, which decides little. The folds judge the recipe on all of its
images instead. They say nothing of the very model that is released: gates never read them, and their models are kept
nowhere but in the store.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from components.clusters import Clusters
from components.companions import TEST_LEDGER
from components.contracts.data import Dataset, Splits
from components.contracts.errors import DataError
from components.contracts.models import Engine
from components.contracts.progress import Progress
from components.contracts.records import Stored
from components.contracts.verdicts import Evaluation, FoldEstimate
from components.evaluation import pooled
from components.export import REFERENCE
from components.splitting import TestLedger, fold, split
from flows.training import keys, steps
from flows.training.run import Run


def divided(run: Run, dataset: Stored[Dataset]) -> list[Stored[Splits]]:
    """The splits of each fold that the recipe wants; raises DataError for more folds than a class can be divided into."""
    of = run.config.evaluation.folds
    return [_divided(run, dataset, number, of) for number in range(of)]


def estimated(run: Run, dataset: Stored[Dataset], folds: Sequence[Stored[Splits]]) -> FoldEstimate | None:
    """Train and judge the recipe once on each of these splits; None where there are none."""
    if not folds:
        return None
    judged = [_judged(run, splits, _name(number, len(folds))) for number, splits in enumerate(folds)]
    return pooled(judged, run.task, dataset.record.classes)


def _name(number: int, of: int) -> str:
    return f"fold-{number + 1}-of-{of}"


def _divided(run: Run, dataset: Stored[Dataset], number: int, of: int) -> Stored[Splits]:
    name = _name(number, of)

    def divide(out: Path, progress: Progress) -> Splits:
        ledger, clusters = TestLedger.read(run.workspace.root / TEST_LEDGER), Clusters.read(run.workspace.root)
        config = run.config.splitting
        turn = fold(dataset, ledger, number, of, config, run.task, clusters=clusters)
        try:
            return split(dataset, turn, config, run.task, clusters=clusters, out=out, progress=progress)
        except DataError as error:
            raise DataError(f"evaluation.folds: in {name}, {error}; or set fewer folds, or none") from error

    inputs = {**keys.splitting_inputs(run, dataset), "fold": name}
    return run.stage("splitting", Splits, divide, inputs=inputs, fold=name)


def _judged(run: Run, splits: Stored[Splits], name: str) -> tuple[Engine, Stored[Evaluation]]:
    checkpoint = steps.optimisation(run, steps.training(run, splits, fold=name), splits, fold=name)
    graph = steps.graph(run, checkpoint, fold=name)
    target = next(target for target in run.config.export.all_targets if target.name == REFERENCE)
    engine = steps.engine(run, checkpoint, graph, splits, target, fold=name)
    return engine.record, steps.evaluation(run, engine, splits, fold=name)
