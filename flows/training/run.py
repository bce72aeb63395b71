"""The workspace and the run: where things lie, and the one cache.

A run is known by what determines its result (recipe, data version, code, locked libraries), so the same command finds the
same run folder again. Each stage's result lives in the store under a key of its inputs; the run folder holds relative
links to it, so `ls` shows the way of the data and nothing is stored twice. See infra/decisions/0002.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from components import git, plugins
from components.compute import Compute
from components.contracts.data import DataVersion
from components.contracts.errors import VisionloopError
from components.contracts.families import Task
from components.contracts.progress import Progress
from components.contracts.records import RecordT, Stored, canonical_json, sha256_text
from components.contracts.verdicts import Lineage
from components.export import TargetConfig, absent
from components.store import write_atomically
from components.training import on_this_machine
from flows.terminal import Console
from flows.training.given_models import GivenModel
from flows.workspace.recipes import RunConfig
from flows.workspace.settings import Settings
from flows.workspace.workspace import Workspace, lock_digest, version

STAGES = ("validation", "splitting", "training", "export", "evaluation", "gating", "packaging", "evidence", "registration")
_CODE = Path(__file__).resolve().parents[2]
_ELSEWHERE = {"registration": "registry/models.py", "serving_check": "flows/training/serving_check.py"}
"""The code of the stages that are no component."""
_BESIDE = {"serving_check": "packaging", "optimisation": "training"}
"""A stage that not every run has, or that asks about what another one made, and has the number of that one.

A number of its own would rename the folders of all runs, and those of before would not be found any more.
"""


def stage_folder(name: str) -> str:
    """The folder of a stage in a run's folder: its number in the data's way, and its name."""
    return f"{stage_number(name)}-{name}"


def stage_number(name: str) -> int:
    """Where a stage stands in the data's way."""
    return STAGES.index(_BESIDE.get(name, name)) + 1


def code_digest(workspace_plugins: Path) -> str:
    """sha256 over every source file that can change a result, the workspace's plug-ins included."""
    digest = hashlib.sha256()
    for folder in (_CODE / "components", _CODE / "registry", workspace_plugins):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder.parent).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def run_id(workspace: Workspace, config: RunConfig, data: DataVersion, settings: Settings) -> str:
    """Names a run by all that can change what comes of it: recipe, data, code, libraries and threads."""
    identity = [config.to_run.digest(), data.digest(), code_digest(workspace.plugins), lock_digest(), settings.num_threads]
    return f"{config.name}-{sha256_text(canonical_json(identity))[:12]}"


class Run:
    """One run of the training flow in a workspace."""

    def __init__(
        self,
        workspace: Workspace,
        config: RunConfig,
        data: DataVersion,
        settings: Settings,
        console: Console,
        *,
        requested_by: str = "",
        reason: str = "manual",
        folder: Path | None = None,
    ) -> None:
        """`folder` is where its results are linked, for what is not listed among the runs."""
        self.requested_by, self.reason = requested_by, reason
        self.warm_start: GivenModel | None = None
        """The champion that the training goes on from, where the recipe says so."""
        self.teacher: GivenModel | None = None
        """Whose answers the training learns, where the recipe says so."""
        self.workspace = workspace
        self.config = config = config.to_run
        self.data = data
        self.settings = settings
        self.console = console
        self.store = workspace.store
        self.absent = absent(config.export)
        """Engines that cannot be built on this machine, or could not be, with the reason."""
        commit, dirty = git.state(workspace.root)
        code = code_digest(workspace.plugins)
        self.id = run_id(workspace, config, data, settings)
        self.folder = folder or workspace.runs / self.id
        self.lineage = Lineage(
            run_id=self.id,
            recipe=config.name,
            data_version=data.dvc_hash,
            git_commit=commit,
            git_dirty=dirty,
            code_version=f"{version()}+{code[:12]}",
            config_digest=config.digest(),
            lock_digest=lock_digest(),
            study_digest=config.tuned.study_digest if config.tuned else "",
            choice_digest=config.chosen.choice_digest if config.chosen else "",
        )

    def begin(self, overrides: Sequence[str]) -> None:
        """Make its folder, which says what is run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        described = {"run": self.lineage.to_json(), "config": self.config.to_json(), "set": list(overrides)}
        path = self.folder / "config.json"
        write_atomically(path, json.dumps(described | {"started": _first_start(path)}, indent=1).encode())

    @property
    def plugin_folder(self) -> Path | None:
        """The workspace's own plug-ins, for processes that load them anew."""
        return self.workspace.plugins if self.workspace.plugins.is_dir() else None

    @property
    def compute(self) -> Compute:
        """What the training computes on here; raises ConfigError where it cannot."""
        return on_this_machine(self.config.training, self.settings.num_threads)

    @property
    def weights_told(self) -> str:
        """The weights that the training begins from, in words."""
        return self.warm_start.told if self.warm_start else self.config.training.weights

    @property
    def taught_by(self) -> str:
        """The teacher of the training, in words; empty without one."""
        if self.teacher is None:
            return ""
        return f"{self.teacher.told}{f'; {self.teacher.note}' if self.teacher.note else ''}"

    @property
    def task(self) -> Task:
        """What is predicted."""
        task: Task = plugins.load("tasks", self.config.training.task, dict(self.config.training.task_settings))
        return task

    @property
    def targets(self) -> tuple[TargetConfig, ...]:
        """What is built here: the reference first."""
        return tuple(target for target in self.config.export.all_targets if target.name not in self.absent)

    def stage(
        self,
        name: str,
        record: type[RecordT],
        compute: Callable[[Path, Progress], RecordT],
        *,
        inputs: Mapping[str, str],
        instance: str = "",
        fold: str = "",
        beside: str = "",
        leftovers: Sequence[str] = (),
        anew: bool = False,
    ) -> Stored[RecordT]:
        """The stage's result from the store, or computed into a hidden folder and published.

        The key covers `inputs` (digests of records, configs and plug-ins), the stage's source with everything it imports,
        and the locked libraries. A stage with `leftovers` takes up what a killed run left: files of these names serve to
        resume and are removed when the result is published. What another failed stage leaves is kept in the run folder.
        With `anew` it is computed whatever the store holds, and replaces that. The stages of a `fold` lie in a folder of
        their own; so do those of what stands `beside` the run's own model, which have the keys that a run of it gives them.
        """
        place = f"folds/{fold}/{stage_folder(name)}" if fold else stage_folder(name)
        place = f"{beside}/{place}" if beside else place
        named = "-".join(part for part in (fold, instance) if part)
        label = " ".join(part for part in (name, named, beside) if part)
        key = self.key(name, inputs, named)
        kind = f"{name}/{named}" if named else name
        with self.console.stage(label, stage_number(name)) as (progress, cached):
            found = None if anew else self.store.open(kind, key, record)
            if found is not None:
                cached.append(True)
            else:
                resumable = bool(leftovers)
                with self.store.writing(kind, key, resumable=resumable) as out:
                    try:
                        result = compute(out, progress)
                    except VisionloopError as error:
                        self._keep_evidence(out, place, error, resumable=resumable)
                        raise
                found = self.store.publish(
                    kind,
                    key,
                    result,
                    inputs=inputs,
                    provenance=self.lineage.to_json(),
                    resumable=resumable,
                    leftovers=leftovers,
                    replace=anew,
                )
        self.link(found.folder, f"{place}/{instance}" if instance else place)
        return found

    def stored(
        self, name: str, record: type[RecordT], *, inputs: Mapping[str, str], instance: str = ""
    ) -> Stored[RecordT] | None:
        """What the store holds of a stage with these inputs; None when it was not computed yet."""
        return self.store.open(f"{name}/{instance}" if instance else name, self.key(name, inputs, instance), record)

    def key(self, name: str, inputs: Mapping[str, str], instance: str = "") -> str:
        """The store key of a stage with these inputs."""
        module = _ELSEWHERE.get(name, f"components/{name}.py")
        parts = {
            "stage": name,
            "instance": instance,
            "inputs": dict(inputs),
            "source": plugins.source_digest(_CODE / module),
            "lock": lock_digest(),
        }
        return sha256_text(canonical_json(parts))[:32]

    def link(self, target: Path, name: str) -> None:
        """Point `name` in the run folder at a published folder, by a relative link."""
        link = self.folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        relative = os.path.relpath(target, link.parent)
        if link.is_symlink() and os.readlink(link) == relative:
            return
        temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(relative)
        os.replace(temporary, link)

    def _keep_evidence(self, out: Path, place: str, error: VisionloopError, *, resumable: bool) -> None:
        if resumable or not any(out.iterdir()):
            return
        kept = self.folder / f"{place}.failed"
        if kept.exists():
            shutil.rmtree(kept)
        shutil.copytree(out, kept)
        docs = kept / "data_docs" / "index.html"
        error.add_note(f"What it wrote is kept in {kept}" + (f"; open {docs}" if docs.exists() else ""))


def _first_start(path: Path) -> str:
    """When a run was first started, UTC: a run that goes on keeps it."""
    try:
        return str(json.loads(path.read_text())["started"])
    except (OSError, ValueError, KeyError, TypeError):
        return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
