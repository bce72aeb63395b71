"""The estimate of a recipe from k folds: all images take turns as test images, each of a model that never saw them.

A small project has a frozen test of a few dozen images, which decides little. The folds judge the recipe on all of its
images instead. They say nothing of the very model that is released: gates never read them, and their models are kept
nowhere but in the store.
"""

from __future__ import annotations

from pathlib import Path

from components.clusters import Clusters
from components.companions import TEST_LEDGER
from components.contracts.data import Dataset, Splits
from components.contracts.models import Engine
from components.contracts.progress import Progress
from components.contracts.records import Stored
from components.contracts.verdicts import Evaluation, FoldEstimate
from components.evaluation import pooled
from components.export import REFERENCE
from components.splitting import TestLedger, fold, split
from flows.training import keys, steps
from flows.training.run import Run


def estimated(run: Run, dataset: Stored[Dataset]) -> FoldEstimate | None:
    """Train and judge the recipe once for each fold that it wants; None where it wants none."""
    of = run.config.evaluation.folds
    if not of:
        return None
    folds = [_judged(run, dataset, number, of) for number in range(of)]
    return pooled(folds, run.task, dataset.record.classes)


def _judged(run: Run, dataset: Stored[Dataset], number: int, of: int) -> tuple[Engine, Stored[Evaluation]]:
    name = f"fold-{number + 1}-of-{of}"

    def divide(out: Path, progress: Progress) -> Splits:
        ledger, clusters = TestLedger.read(run.workspace.root / TEST_LEDGER), Clusters.read(run.workspace.root)
        config = run.config.splitting
        turn = fold(dataset, ledger, number, of, config, run.task, clusters=clusters)
        return split(dataset, turn, config, run.task, clusters=clusters, out=out, progress=progress)

    inputs = {**keys.splitting_inputs(run, dataset), "fold": name}
    splits = run.stage("splitting", Splits, divide, inputs=inputs, fold=name)
    checkpoint = steps.training(run, splits, fold=name)
    graph = steps.graph(run, checkpoint, fold=name)
    target = next(target for target in run.config.export.all_targets if target.name == REFERENCE)
    engine = steps.engine(run, checkpoint, graph, splits, target, fold=name)
    return engine.record, steps.evaluation(run, engine, splits, fold=name)
