"""A run learns from a teacher: what it is keyed by, what is told of it, and what is refused before any work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from shapes import visionloop

from components import plugins
from components.compute import Compute
from components.contracts.data import DataVersion
from components.contracts.errors import ConfigError, TamperedArtefact
from components.contracts.models import Checkpoint
from components.contracts.records import Stored
from components.distillation import Teacher, stored_checkpoint
from components.store import read_manifest
from flows.training import keys
from flows.training.given_models import GivenModel, keep, teacher
from flows.workspace.recipes import load_recipe

ONE_ENGINE = ("--set", "export.targets=[{target: onnxruntime}]", "--set", "export.serving=onnxruntime-fp32")


def test_a_student_of_a_checkpoint_says_so_everywhere(trained: Path, tmp_path: Path, prefect_server: str) -> None:
    root = Path(shutil.copytree(trained, tmp_path / "copy", symlinks=True))
    (run,) = (root / ".visionloop" / "runs").glob("smoke-*")
    folder = f"{run.relative_to(root)}/3-training"
    taught = (
        "train",
        "-r",
        "smoke",
        "--set",
        f"training.teacher={{checkpoint: {folder}}}",
        "--set",
        "training.fit.epochs=2",
    )
    planned = visionloop(*taught, *ONE_ENGINE, "--dry-run", cwd=root)
    assert planned.returncode == 0, planned.stderr
    assert f"teacher: checkpoint {folder} (weights" in planned.stdout
    done = visionloop(*taught, *ONE_ENGINE, "--json", cwd=root)
    assert done.stdout, done.stderr
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    teachers = stored_checkpoint(root / folder)[0].record
    student = Path(summary["run_folder"])
    told = f"checkpoint {folder} (weights {teachers.weights.sha256[:16]})"
    assert f"    teacher: {told}\n" in done.stderr
    inputs = read_manifest((student / "3-training").resolve())["inputs"]
    assert inputs["teacher"] == teachers.digest()
    assert inputs["teacher/backbones/small_cnn"] == plugins.member_digest("backbones", "small_cnn")
    assert told in (student / "report.html").read_text()
    card = student / ".bundle" / "model-card.md"
    assert f"- Teacher: {told}\n" in card.read_text()
    kept = json.loads((student / ".bundle" / "evidence-teacher.json").read_text())
    assert kept == {"checkpoint": teachers.digest(), "weights": teachers.weights.sha256, "told": told}
    if summary["version"]:
        assert f"It learned from a teacher: {told}." in visionloop("show", summary["version"], cwd=root).stdout
    # What a teacher was is known when it is there no more.
    (run / "3-training").unlink()
    planned = visionloop(*taught, *ONE_ENGINE, "--dry-run", cwd=root)
    assert "training: from the store" in planned.stdout, planned.stderr


def test_teachers_that_cannot_teach_are_refused_before_validation(trained: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(trained, tmp_path / "copy", symlinks=True))
    (run,) = (root / ".visionloop" / "runs").glob("smoke-*")

    def refused(teacher: str, *more: str) -> str:
        done = visionloop("train", "-r", "smoke", "--set", f"training.teacher={teacher}", *more, cwd=root)
        assert done.returncode == 2, done.stdout
        assert "validation:" not in done.stderr
        return done.stderr

    assert "training.teacher: champion: shapes: shapes has no champion, since none of its" in refused("{champion: shapes}")
    assert "is no folder; expected one that a training published" in refused("{checkpoint: none}")
    assert "holds a result of 'splitting'" in refused(f"{{checkpoint: {run.relative_to(root)}/2-splitting}}")
    assert "training.teacher: name one teacher" in refused("{share: 0.5}")
    assert "the teacher, whose answers are learned, did" in refused("{champion: m}", "--set", "evaluation.folds=5")
    folder = f"{run.relative_to(root)}/3-training"
    shutil.move(root / "data" / "disc", root / "data" / "ring")
    assert visionloop("data", "add", cwd=root).returncode == 0
    assert "answers about other classes than the data have (new: ring; gone: disc)" in refused(f"{{checkpoint: {folder}}}")
    weights = (run / "3-training").resolve() / "weights.safetensors"
    weights.write_bytes(weights.read_bytes() + b"x")
    assert "weights.safetensors was changed after it was published" in refused(f"{{checkpoint: {folder}}}")


class Champions:
    """As much of a registry as a teacher asks."""

    def __init__(self, checkpoint: Stored[Checkpoint], data: DataVersion) -> None:
        self.found, self.version, self.asked = (checkpoint, data), "3", list[str]()

    def champion(self, model: str) -> Any:
        self.asked.append(model)
        return SimpleNamespace(body={"version": self.version})

    def fetch_checkpoint(self, *_: Any, **__: Any) -> tuple[Stored[Checkpoint], DataVersion]:
        return self.found


def test_a_champion_teaches_and_stays_the_teacher_of_its_run(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run,) = (trained / ".visionloop" / "runs").glob("smoke-*")
    checkpoint, dvc_hash = stored_checkpoint(run / "3-training")

    def version(hashed: str, *renames: tuple[str, str]) -> DataVersion:
        return DataVersion(dvc_hash=hashed, num_files=1, bytes=1, ledger_sha256="l", renamed=renames)

    registry: Any = Champions(checkpoint, version(dvc_hash))
    config, today = Teacher(champion="shapes"), version("now.dir", ("disc", "ring"))

    def given() -> Any:
        return teacher(config, today, registry, run=tmp_path, root=trained, cache=tmp_path)

    first = given()
    assert (first.version, first.digest, first.renamed) == ("3", checkpoint.record.digest(), (("disc", "ring"),))
    assert (first.note, registry.asked) == ("", ["shapes"])
    registry.version = "4"
    assert given().version == "4"
    keep(first, tmp_path)
    again = given()
    assert (again.told, again.digest, again.renamed) == (first.told, first.digest, first.renamed)
    assert "champion of shapes, version 3" in again.told
    # A student of another backbone depends on the code of its teacher's, also when that is only remembered.
    student = load_recipe("transfer").training
    splits: Any = SimpleNamespace(record=SimpleNamespace(digest=lambda: "s"))
    run_of = SimpleNamespace(
        config=SimpleNamespace(training=student),
        workspace=SimpleNamespace(root=trained),
        warm_start=None,
        settings=SimpleNamespace(num_threads=1),
        compute=Compute(),
    )

    def inputs(taught_by: GivenModel | None) -> dict[str, str]:
        run_of.teacher = taught_by
        return keys.training_inputs(run_of, splits)  # type: ignore[arg-type]

    before, alone = inputs(first), inputs(None)
    assert before == inputs(again)
    assert alone == {key: value for key, value in before.items() if not key.startswith("teacher")}
    monkeypatch.setattr(plugins, "source_digest", lambda path: f"now {path.stem}")
    changed = {key for key, value in inputs(again).items() if value != before[key]}
    assert changed - {key for key, value in inputs(None).items() if value != alone[key]} == {"teacher/backbones/small_cnn"}
    (tmp_path / "teacher.json").write_text((tmp_path / "teacher.json").read_text().replace('"3"', '"2"'))
    with pytest.raises(
        TamperedArtefact, match="teacher.json was changed after it was written; remove it to learn from today's"
    ):
        given()
    (tmp_path / "teacher.json").unlink()
    registry.found = checkpoint, version("0" * 32 + ".dir")
    assert given().note.endswith("it may have learned from what are test images here")
    keep(given(), tmp_path)
    assert given().note.endswith("it may have learned from what are test images here")


def test_a_checkpoint_knows_the_names_of_its_classes_today_by_the_version_it_was_trained_on(trained: Path) -> None:
    (run,) = (trained / ".visionloop" / "runs").glob("smoke-*")
    config = Teacher(checkpoint=f"{run.relative_to(trained)}/3-training")
    today = DataVersion(dvc_hash="now.dir", num_files=1, bytes=1, ledger_sha256="l", renamed=(("disc", "ring"),))
    found = teacher(config, today, run=run, root=trained, cache=trained)
    assert (found.renamed, found.note, found.version) == ((("disc", "ring"),), "", "")


def test_the_recipe_distil_asks_for_the_champion_of_transfer() -> None:
    student, teachers = load_recipe("distil"), load_recipe("transfer")
    assert student.training.teacher is not None
    assert student.training.teacher.champion == teachers.model != student.model
    assert student.splitting == teachers.splitting, "what the teacher learned from would be valid here"
    with pytest.raises(ConfigError, match="evaluation.folds judge models that never saw the images, and the teacher"):
        load_recipe("distil", ["evaluation.folds=5"])
