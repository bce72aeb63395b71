"""What a member of a family has to do, beyond having the right methods: a few small probes for each family.

Shipped members and a workspace's own are put through the same. A probe takes a member and yields what it does against its
family's contract; what the member raises goes through. Nothing here is downloaded, and nothing takes more than seconds.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import numpy.typing as npt

from components import plugins
from components.attributes import FILE, LEFT_OUT, read_said
from components.conformance import Breach
from components.contracts.errors import (
    DataError,
    EngineUnavailable,
    UndecodableImage,
    VisionloopError,
    WeightsUnavailable,
    in_short,
)
from components.contracts.families import (
    Answers,
    Augmentation,
    Backbone,
    Corrupted,
    Evidence,
    ExportRequest,
    Finding,
    Gate,
    Known,
    Loss,
    Pass,
    PassRequest,
    Slices,
    Source,
    Target,
    Task,
)
from components.contracts.issues import Need, Pair
from components.contracts.models import Checkpoint, Engine, Precision, Preprocessing
from components.contracts.records import FileDigest, Stored
from components.contracts.verdicts import ClassMetrics, Estimate, Evaluation, Measurement
from components.corruptions import CORRUPTED, VARIANTS
from components.foreign_files import RECEIVED
from components.images import decode
from components.intervals import paired_difference
from components.store import describe, sha256_file

if TYPE_CHECKING:
    import pandas as pd
    import torch

_SPLITS = ("train/", "val/", "test/")


def source_breaches(source: Source, _: str) -> Iterator[Breach]:
    """It writes one folder per class, of pictures that can be read, the same bytes twice."""
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        written = []
        for folder in (Path(first), Path(second)):
            source.fetch(out=folder)
            shutil.rmtree(folder / RECEIVED, ignore_errors=True)
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            written.append({path.relative_to(folder).as_posix(): sha256_file(path) for path in files})
        try:
            said = read_said(Path(first) / FILE)
        except DataError as error:
            said = {}
            yield Breach("fetch", f"wrote {error}")
        if written[0] != written[1]:
            yield Breach("fetch", "wrote other files or bytes the second time; the same on every machine are expected")
        for digests in written:
            for beside in (FILE, LEFT_OUT):
                digests.pop(beside, None)
        if unwritten := sorted(said.keys() - written[0].keys()):
            yield Breach("fetch", f"names {unwritten[0]!r} in {FILE}, and wrote no such file")
        within = {
            file: file.split("/", 1)[1] if file.startswith(_SPLITS) and file.count("/") == 2 else file for file in written[0]
        }
        astray = [file for file, inner in within.items() if inner.count("/") != 1]
        if astray:
            yield Breach("fetch", f"wrote {astray[0]!r}; expected every picture as CLASS/FILE")
        classes = {inner.split("/")[0] for inner in within.values()}
        if len(classes) < 2:
            yield Breach("fetch", f"wrote {len(classes)} classes; at least 2 are expected, a folder each")
        for file in written[0]:
            try:
                decode((Path(first) / file).read_bytes())
            except UndecodableImage as error:
                yield Breach("fetch", f"wrote {file!r}, which cannot be read as a picture: {error}")
                break


def gate_breaches(gate: Gate, name: str) -> Iterator[Breach]:
    """It fails closed: a broken part of the evidence is worth no more to it than a missing one."""
    whole = whole_evidence()
    nothing = gate.judge(_without(whole, *_PARTS))
    if nothing.status != "inconclusive":
        yield Breach("judge", f"answers {nothing.status!r} where there is no evidence at all; expected 'inconclusive'")
    for finding in (nothing, gate.judge(whole)):
        if finding.gate != name:
            yield Breach("judge", f"answers as gate {finding.gate!r}; expected {name!r}, the name of its file")
            break
        if not finding.message.strip():
            yield Breach("judge", f"answers {finding.status!r} without a message that says why")
            break
    if gate.judge(whole) != gate.judge(whole):
        yield Breach("judge", "gives two answers to the same evidence; it has to depend on nothing else")
    for what, broken, parts in _broken(whole):
        if gate.judge(broken).status == "pass" and gate.judge(_without(whole, *parts)).status != "pass":
            yield Breach("judge", f"passes {what}; expected 'inconclusive'")


_IMAGES = 1000
_PARTS = ("evaluation", "measurement", "answers", "reference", "champion", "corrupted", "champion_corrupted", "slices")


def whole_evidence() -> Evidence:
    """An engine that is right on every one of 1,000 images of two classes, corrupted too, as was the champion, and fast."""
    engine = _engine()
    answers = _answers(np.arange(_IMAGES, dtype=np.int64) % 2)
    sure = Estimate(value=1.0, low=0.996, high=1.0, n=_IMAGES, method="wilson")
    none = Estimate(value=0.0, low=0.0, high=0.001, n=_IMAGES, method="bootstrap")
    half = sure.model_copy(update={"n": _IMAGES // 2, "low": 0.992})
    return Evidence(
        engine=engine,
        evaluation=Evaluation(
            engine=engine.name,
            engine_digest=engine.digest(),
            test_digest="t" * 64,
            status="evaluated",
            num_images=_IMAGES,
            metrics={"accuracy": sure, "mean_class_accuracy": sure, "log_loss": none, "ece": none},
            per_class=tuple(
                ClassMetrics(name=name, support=_IMAGES // 2, precision=half, recall=half, f1=half)
                for name in engine.classes
            ),
            confusion=((_IMAGES // 2, 0), (0, _IMAGES // 2)),
        ),
        measurement=Measurement(
            engine=engine.name,
            engine_digest=engine.digest(),
            status="measured",
            machine="any",
            num_threads=1,
            num_runs=_IMAGES,
            latency_p50_ms=0.01,
            latency_p90_ms=0.01,
            latency_p99_ms=0.01,
            latency_p99=Estimate(value=0.01, low=0.01, high=0.01, n=_IMAGES, method="bootstrap"),
            rounds_p50_ms=(0.01, 0.01),
            rounds_p99_ms=(0.01, 0.01),
            size_bytes=engine.size_bytes,
        ),
        answers=answers,
        reference=answers,
        champion=answers,
        champion_known=True,
        champion_classes=engine.classes,
        corrupted=_corrupted(answers),
        champion_corrupted=_corrupted(answers),
        slices=_slices(answers),
    )


def _engine() -> Engine:
    return Engine(
        name="onnxruntime-fp32",
        target="onnxruntime",
        precision="fp32",
        settings={},
        checkpoint_digest="c" * 64,
        files=(),
        entry="model.onnx",
        preprocessing=Preprocessing(
            channels=1, height=16, width=16, resize_shortest=16, interpolation="bilinear", mean=(0.5,), std=(0.5,)
        ),
        classes=("a", "b"),
        embedding_dim=4,
        temperature=1.0,
        runtime="any",
        built_for=(),
        facts={},
    )


def _answers(right: npt.NDArray[np.int64]) -> Answers:
    """Answers that are right, on one image for each of these positions of a class."""
    classes = ("a", "b")
    logits = np.where(right[:, None] == np.arange(2), 8.0, -8.0).astype(np.float32)
    logits.setflags(write=False)  # a gate that changes what it judges is told
    ids = tuple(f"image {index}" for index in range(len(right)))
    return Answers(ids, tuple(classes[i] for i in right), logits, classes, plugins.load("tasks", "classification"))


def _corrupted(answers: Answers) -> Corrupted:
    """The same answers however the images are changed."""
    return Corrupted(dict.fromkeys(VARIANTS, answers))


def _slices(answers: Answers) -> Slices:
    """Two slices, of half the images each."""
    return Slices(answers.image_ids, {"half": [f"{row % 2}" for row in range(len(answers.image_ids))]})


def _without(evidence: Evidence, *parts: str) -> Evidence:
    """The evidence where some parts of it were never made."""
    absent: dict[str, Any] = {part: None for part in parts if part != "evaluation"}
    if "evaluation" in parts:
        absent["evaluation"] = evidence.evaluation.model_copy(
            update={"num_images": 0, "metrics": {}, "per_class": (), "confusion": ()}
        )
    if "champion" in parts:
        absent |= {"champion_known": False, "champion_classes": ()}
    return dataclasses.replace(evidence, **absent)


def _broken(whole: Evidence) -> Iterator[tuple[str, Evidence, tuple[str, ...]]]:
    """What is wrong, the evidence that has it, and the parts of it that are then worth nothing.

    Records refuse numbers that are not finite, so only answers can hold them.
    """
    evaluation, measurement = whole.evaluation, whole.measurement
    assert measurement is not None
    nan = float("nan")

    def measured(**changes: Any) -> Evidence:
        return dataclasses.replace(whole, measurement=measurement.model_copy(update=changes))

    def estimated(change: Mapping[str, Any], support: int) -> Evaluation:
        each = [
            found.model_copy(
                update={"support": support}
                | {part: getattr(found, part).model_copy(update=change) for part in ("precision", "recall", "f1")}
            )
            for found in evaluation.per_class
        ]
        metrics = {name: estimate.model_copy(update=change) for name, estimate in evaluation.metrics.items()}
        return evaluation.model_copy(update={"metrics": metrics, "per_class": tuple(each), "num_images": support})

    def answered(right: npt.NDArray[np.int64], of: Evaluation) -> Evidence:
        answers = _answers(right)
        corrupted = _corrupted(answers)
        return dataclasses.replace(
            whole,
            evaluation=of,
            answers=answers,
            reference=answers,
            champion=answers,
            corrupted=corrupted,
            champion_corrupted=corrupted,
            slices=_slices(answers),
        )

    everything = ("evaluation", "answers", "reference", "champion", "corrupted", "champion_corrupted", "slices")
    empty = np.zeros(0, dtype=np.int64)
    one = estimated({"low": 0.2, "high": 1.0, "n": 1}, 1)
    yield "on no test images", answered(empty, _without(whole, "evaluation").evaluation), everything
    yield "on a single test image", answered(np.zeros(1, dtype=np.int64), one), everything
    assert whole.answers is not None
    blank = dataclasses.replace(whole.answers, logits=np.full_like(whole.answers.logits, nan))
    yield "with answers that are not finite", dataclasses.replace(whole, answers=blank), ("answers",)
    others = dataclasses.replace(whole.answers, image_ids=tuple(f"other {index}" for index in range(_IMAGES)))
    shown = Corrupted(dict.fromkeys(VARIANTS, whole.answers) | {CORRUPTED[0]: blank})
    told = "with answers on corrupted images that are not finite"
    yield told, dataclasses.replace(whole, corrupted=shown), ("corrupted",)
    others_told = "with answers on other images than the reference and the champion"
    elsewhere = dataclasses.replace(whole, answers=others, corrupted=_corrupted(others))
    yield others_told, elsewhere, ("reference", "champion", "champion_corrupted", "slices")
    yield "with a measurement of another engine", measured(engine_digest="f" * 64), ("measurement",)
    yield "with a measurement of a single run", measured(num_runs=1), ("measurement",)


def backbone_breaches(backbone: Backbone, _: str) -> Iterator[Breach]:
    """It has its shapes, every parameter is reached by the gradient, and a step of training changes it."""
    import torch

    size, dim = backbone.preprocessing, backbone.embedding_dim
    if not backbone.weights_choices:
        try:
            with tempfile.TemporaryDirectory() as cache:
                backbone.pretrained("anything", cache=Path(cache))
        except WeightsUnavailable:
            pass
        else:
            yield Breach(
                "pretrained", "gives weights though weights_choices names none; raise WeightsUnavailable, or name them"
            )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = backbone.build()
        shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        if {key: tuple(value.shape) for key, value in backbone.build().state_dict().items()} != shapes:
            yield Breach("build", "builds another network the second time; its weights could not be loaded again")
        images = torch.randn(4, size.channels, size.height, size.width)
        features = module(images)
        if tuple(features.shape) != (4, dim):
            yield Breach(
                "build", f"gives features of shape {tuple(features.shape)} for 4 images; expected (4, {dim}), embedding_dim"
            )
            return
        head = torch.nn.Linear(dim, 3)
        parameters = dict(module.named_parameters())
        before = {key: value.detach().clone() for key, value in parameters.items()}
        step = torch.optim.SGD([*parameters.values(), *head.parameters()], lr=0.1)
        loss = torch.nn.functional.cross_entropy(head(features), torch.tensor([0, 1, 2, 0]))
        loss.backward()  # type: ignore[no-untyped-call]
        unreached = [key for key, value in parameters.items() if value.grad is None or not torch.isfinite(value.grad).all()]
        if unreached or not torch.isfinite(loss):
            yield Breach(
                "build", f"no finite gradient reaches {', '.join(unreached[:3]) or 'it'}; it would never be trained"
            )
            return
        step.step()
        if all(torch.equal(before[key], value) for key, value in parameters.items()):
            yield Breach("build", "has no parameter that a step of training changes")
        module.eval()
        with torch.inference_mode():
            together, single = module(images), torch.cat([module(images[i : i + 1]) for i in range(4)])
        if not torch.allclose(together, single, rtol=1e-3, atol=1e-3):
            yield Breach("build", "gives a picture other features alone than beside others, in evaluation mode")
    yield from _divided(backbone, module, images)


def _divided(backbone: Backbone, module: torch.nn.Module, images: torch.Tensor) -> Iterator[Breach]:
    """Blocks, where it has them, hold each tensor of the module once, and applied one after the other are the module."""
    import torch

    known = getattr(backbone, "blocks", None)
    found = known(module) if known is not None else []
    if not isinstance(found, list) or not all(isinstance(block, torch.nn.Module) for block in found):
        yield Breach("blocks", f"answers {found!r:.60}; expected a list of modules, [] where the blocks are not known")
        return
    if not found:
        return
    if len(found) == 1:
        yield Breach("blocks", "gives one block; expected two or more, so that some can train alone, or [] for not known")
    own = {id(value): name for name, value in module.state_dict(keep_vars=True).items()}
    place: dict[int, int] = {}
    for number, block in enumerate(found, 1):
        for name, value in block.state_dict(keep_vars=True).items():
            if id(value) not in own:
                yield Breach(
                    "blocks",
                    f"has {name} in block {number}, which is no tensor of the module; make blocks of the module that is "
                    f"given, and not of copies or new layers",
                )
                return
            if place.setdefault(id(value), number) != number:
                yield Breach(
                    "blocks",
                    f"has {own[id(value)]} in blocks {place[id(value)]} and {number}; expected it in one, as it cannot be "
                    f"frozen and train at once",
                )
                return
    left_out = [name for key, name in own.items() if key not in place]
    if left_out:
        yield Breach(
            "blocks",
            f"leave out {', '.join(left_out[:3])}; expected every tensor of the module in a block: what comes before the "
            f"blocks in the first, what comes after them in the last",
        )
        return
    told = "the blocks applied one after the other have to answer what the module answers, to the bit"
    with torch.inference_mode():
        wanted, passed = module(images), images
        try:
            for block in found:
                passed = block.eval()(passed)
        except RuntimeError as error:
            yield Breach("blocks", f"do not take what the one before gives ({in_short(error)}); {told}")
            return
    if not torch.equal(passed, wanted):
        yield Breach("blocks", f"answer something else than the module in evaluation mode; {told}")


def task_breaches(task: Task, _: str) -> Iterator[Breach]:
    """A head learns by its loss, and what is read and measured of its answers fits together."""
    import torch

    names = ("apple", "pear", "plum")
    labels = [names[i % 3] for i in range(60)]
    classes = task.classes(labels)
    if not classes or list(classes) != sorted(set(classes)):
        yield Breach("classes", f"answers {classes}; expected some names, sorted, each once")
        return
    targets = task.targets(labels, classes)
    if len(targets) != len(labels):
        yield Breach("targets", f"answers {len(targets)} rows for {len(labels)} annotations")
        return
    try:
        task.targets(["no such class"], classes)
    except DataError:
        pass
    else:
        yield Breach("targets", "takes an annotation of no class; raise DataError")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        embeddings = torch.nn.functional.one_hot(torch.arange(60) % 3, 8).float() + 0.1 * torch.randn(60, 8)
        head = task.head(8, len(classes))
        step = torch.optim.Adam(head.parameters(), lr=0.05)
        losses = []
        for _round in range(30):
            loss = task.loss(head(embeddings), torch.from_numpy(targets))
            if loss.ndim or not torch.isfinite(loss):
                yield Breach("loss", f"answers {loss.detach()}; expected one finite number, the batch's mean")
                return
            step.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            step.step()
            losses.append(float(loss.detach()))
        if not losses[-1] < losses[0]:
            yield Breach(
                "loss", f"went from {losses[0]:.3g} to {losses[-1]:.3g} in 30 steps on easy data; a head has to learn by it"
            )
        with torch.inference_mode():
            logits = head.eval()(embeddings).numpy()
    if logits.shape != (60, len(classes)):
        yield Breach("head", f"gives logits of shape {logits.shape}; expected (60, {len(classes)}), a column a class")
        return
    yield from _read(task, logits, labels, classes)
    yield from _measured(task, logits, targets, classes)


def _read(task: Task, logits: npt.NDArray[Any], labels: Sequence[str], classes: tuple[str, ...]) -> Iterator[Breach]:
    n = len(labels)
    probabilities = task.probabilities(logits, 1.0)
    if probabilities.shape != (n, task.width(classes)) or not ((probabilities >= 0) & (probabilities <= 1)).all():
        yield Breach("probabilities", f"are not ({n}, {task.width(classes)}) numbers from 0 to 1")
        return
    readings = task.read(probabilities, classes)
    if len(readings) != n or not all(0 <= reading.confidence <= 1 for reading in readings):
        yield Breach("read", f"gives {len(readings)} readings of {n} answers, or a confidence outside of 0 to 1")
    columns = task.drift_columns(probabilities, classes)
    if not {"confidence", "predicted"} <= set(columns) or any(len(column) != n for column in columns.values()):
        yield Breach(
            "drift_columns", f"gives {', '.join(columns)}; expected confidence and predicted among them, {n} values each"
        )
    for output in task.outputs(classes):
        if len(output.values(probabilities.astype(np.float32))) != n:
            yield Breach("outputs", f"{output.name} has not one row an image")
    if not task.agree(logits, logits).all():
        yield Breach("agree", "says that an engine does not answer like itself")
    if not task.concerns(labels, classes).all():
        yield Breach("concerns", "leaves out images though all classes are there")
    if not np.array_equal(task.select(logits, classes, classes), logits):
        yield Breach("select", "changes logits though every class is chosen")


def _measured(task: Task, logits: npt.NDArray[Any], targets: npt.NDArray[Any], classes: tuple[str, ...]) -> Iterator[Breach]:
    temperature = task.fit_temperature(logits, targets)
    if not temperature > 0:
        yield Breach("fit_temperature", f"answers {temperature}; expected a positive number")
        return
    metrics = task.metrics(logits, targets, temperature)
    if task.headline not in metrics:
        yield Breach("metrics", f"measures {', '.join(metrics)} but not {task.headline!r}, its headline")
        return
    share = float(task.right(logits, targets).mean())
    if abs(metrics[task.headline].value - share) > 1e-6:
        yield Breach(
            "metrics",
            f"{task.headline} is {metrics[task.headline].value:.4f}; expected {share:.4f}, the share that is right",
        )
    for name, estimate in metrics.items():
        if not estimate.low <= estimate.value <= estimate.high:
            yield Breach("metrics", f"{name} {estimate} lies outside of its own interval")
    if task.metrics(logits, targets, temperature) != metrics:
        yield Breach("metrics", "gives two values for the same answers; draw from a fixed seed")
    try:
        task.metrics(logits[:0], targets[:0], temperature)
    except ValueError:
        pass
    else:
        yield Breach("metrics", "measures something on no images; raise ValueError")
    strangers = [found.name for found in task.per_class(logits, targets, classes) if found.name not in classes]
    if strangers:
        yield Breach("per_class", f"speaks of {strangers[0]!r}, which is no class")
    if "confusion" in task.figures and len(task.confusion(logits, targets, len(classes))) != len(classes):
        yield Breach(
            "confusion", f"has not {len(classes)} rows, one a class; leave it out of `figures` where it says nothing"
        )
    if "reliability" in task.figures and sum(found[2] for found in task.reliability(logits, targets, temperature)) < len(
        targets
    ):
        yield Breach("reliability", "leaves images out of its bins")


def loss_breaches(loss: Loss, _: str) -> Iterator[Breach]:
    """It is a finite mean with finite gradients, which better answers make smaller; shares say the same as numbers."""
    import torch

    logits = torch.linspace(-2, 2, 18).reshape(6, 3).sin() * 3
    targets = torch.tensor([0, 1, 2, 0, 1, 0])
    whole = torch.tensor([30, 20, 10])
    certain = 200 * torch.nn.functional.one_hot(targets, 3)
    shares = torch.nn.functional.one_hot(targets, 3).float()
    asked = [
        ("", logits, targets, whole),
        (" with a class of no images", logits, targets, torch.tensor([30, 20, 0])),
        (" of answers that are certain and right", certain.float(), targets, whole),
        (" of answers that are certain and wrong", -certain.float(), targets, whole),
    ]
    if loss.takes_shares:
        asked.append((" of shares of classes", logits, 0.7 * shares + 0.3 * shares.roll(1, 0), whole))
    found = []
    for what, answers, wanted, counts in asked:
        given = answers.clone().requires_grad_()
        value = loss.loss(given, wanted, counts=counts)
        if value.ndim or not torch.isfinite(value):
            yield Breach("loss", f"answers {value.detach()}{what}; expected one finite number, the batch's mean")
            return
        value.backward()  # type: ignore[no-untyped-call]
        if given.grad is None or not torch.isfinite(given.grad).all():
            yield Breach("loss", f"has no finite gradient{what}; a step would spoil the weights")
            return
        found.append(float(value.detach()))

    def of(answers: torch.Tensor, wanted: torch.Tensor) -> float:
        return float(loss.loss(answers, wanted, counts=whole))

    if abs(of(logits.repeat(2, 1), targets.repeat(2)) - found[0]) > 1e-5 * max(1.0, abs(found[0])):
        yield Breach("loss", "answers another value for the same examples twice over; expected the mean over the batch")
    if not of(logits + 0.1 * shares, targets) < found[0]:
        yield Breach("loss", "does not become smaller when the logit of the right class grows")
    if loss.takes_shares:
        if abs(of(logits, shares) - found[0]) > 1e-5 * max(1.0, abs(found[0])):
            yield Breach("loss", "answers another value for whole shares than for the class numbers that they mean")
        if abs(found[-1] - found[0]) < 1e-6:
            yield Breach("loss", "does not depend on the shares of a mixed image; say in `takes_shares` that it takes none")


def augmentation_breaches(augmentation: Augmentation, _: str) -> Iterator[Breach]:
    """It keeps shape and kind, draws from the given generator alone, and every picture has a draw of its own."""
    import torch

    yield from (_mixed if augmentation.mixes else _changed)(augmentation, torch)


def _changed(augmentation: Augmentation, torch: Any) -> Iterator[Breach]:
    for channels in (3, 1):
        pattern = np.random.default_rng(0).integers(0, 255, (1, 5, 6, channels), dtype=np.uint8)
        # Of several values in patches, so that a change of colour shows as one of place does.
        pictures = torch.from_numpy(pattern.repeat(4, axis=1).repeat(4, axis=2).repeat(64, axis=0))
        wanted = f"torch.uint8 of shape {tuple(pictures.shape)}"
        results = []
        for seed, of_global in ((1, 0), (1, 1), (2, 0)):
            given = pictures.clone()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(of_global)
                before = torch.get_rng_state()
                result = augmentation.change(given, torch.Generator().manual_seed(seed))
                if not torch.equal(before, torch.get_rng_state()):
                    told = "draws from torch's global generator, or leaves it changed; draw from the one that is given"
                    yield Breach("change", told)
                    return
            if result.dtype != torch.uint8 or result.shape != pictures.shape:
                yield Breach("change", f"gives {result.dtype} of shape {tuple(result.shape)}; expected {wanted}")
                return
            if not torch.equal(given, pictures):
                yield Breach("change", "writes into the pictures that it is given; give new ones")
                return
            results.append(result)
        if not torch.equal(results[0], results[1]):
            yield Breach("change", "gives two results for one seed; draw from the generator that is given alone")
            return
        if torch.equal(results[0], results[2]):
            yield Breach("change", "gives the same for another seed; draw from the generator that is given")
            return
        if torch.equal(results[0], results[0][:1].expand_as(pictures)):
            yield Breach("change", "changes every picture alike; draw for each of its own")
            return


def _mixed(augmentation: Augmentation, torch: Any) -> Iterator[Breach]:
    drawn = torch.Generator().manual_seed(0)
    batches = [
        ("pictures", torch.randint(0, 256, (32, 10, 12, 3), dtype=torch.uint8, generator=drawn), True),
        ("maps", torch.rand(32, 5, 7, 6, generator=drawn), False),
    ]
    if not augmentation.needs_space:
        batches.append(("features", torch.rand(32, 8, generator=drawn), False))
    shares = torch.nn.functional.one_hot(torch.arange(32) % 4, 4).float()
    for what, inputs, channels_last in batches:
        results = []
        for seed, of_global in ((1, 0), (1, 1), (2, 0)):
            given, own = inputs.clone(), shares.clone()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(of_global)
                before = torch.get_rng_state()
                mixed, parts = augmentation.mix(given, own, torch.Generator().manual_seed(seed), channels_last=channels_last)
                if not torch.equal(before, torch.get_rng_state()):
                    told = "draws from torch's global generator, or leaves it changed; draw from the one that is given"
                    yield Breach("mix", told)
                    return
            for kind, result, wanted in ((what, mixed, inputs), ("shares", parts, shares)):
                if result.dtype != torch.float32 or result.shape != wanted.shape:
                    told = f"gives {kind} {result.dtype} of shape {tuple(result.shape)}"
                    yield Breach("mix", f"{told}; expected torch.float32 of shape {tuple(wanted.shape)}")
                    return
            if not torch.equal(given, inputs) or not torch.equal(own, shares):
                yield Breach("mix", f"writes into the {what} or shares that it is given; give new ones")
                return
            if not (parts >= 0).all() or not torch.allclose(parts.sum(1), torch.ones(32), atol=1e-5):
                yield Breach("mix", "gives shares that are below 0, or do not sum to 1 for every example")
                return
            results.append((mixed, parts))
        if not all(torch.equal(one, two) for one, two in zip(results[0], results[1], strict=True)):
            yield Breach("mix", "gives two results for one seed; draw from the generator that is given alone")
            return
        if torch.equal(results[0][0], results[2][0]):
            yield Breach("mix", "gives the same for another seed; draw from the generator that is given")
            return


def pass_breaches(member: Pass, _: str) -> Iterator[Breach]:
    """It changes a small network for the better, the same each time, and leaves one that its tensors' shapes rebuild."""
    import torch

    from components.checkpoints import reshape, shapes_of
    from components.network_size import network_size

    with tempfile.TemporaryDirectory() as folder:
        before = _network(Path(folder), width=16)[1]
        networks = [_network(Path(folder), width=16)[1] for _ in range(3)]
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (6, 16, 16, 1), dtype=torch.uint8, generator=draw)
    targets = torch.tensor([0, 1, 2, 0, 1, 2])
    if not 1 <= member.steps <= 1000:
        yield Breach("steps", f"is {member.steps}; expected 1 to 1000, one for each time that it changes the network")
        return
    task: Task = plugins.load("tasks", "classification")
    size = network_size(before, images[:1])
    enough: list[bool] = []
    compared: list[str] = []

    def compare(name: str, right: npt.NDArray[np.bool_]) -> Estimate:
        """As if the network before had answered all of them rightly."""
        compared.append(name)
        return paired_difference(right, np.ones_like(right))

    randomness = torch.random.get_rng_state()
    for network in networks[:2]:
        for step in range(1, member.steps + 1):
            request = PassRequest(
                step=step,
                before=size,
                task=task,
                example=images[:1],
                images=lambda: iter([(images, targets)]),
                calibration=lambda: iter([images]),
                valid=lambda: iter([(images, targets)]),
                rehearsal=False,
                note=lambda _: None,
                compare=compare,
                enough=lambda: enough.append(True),
            )
            enough.clear()
            member.begin(network, request)
            with torch.no_grad():
                if network(images)[0].shape != (6, 3):
                    yield Breach("begin", "leaves a network that does not answer 6 images with 3 logits each")
                    return
            if not any(parameter.requires_grad for parameter in network.parameters()):
                yield Breach("begin", "leaves nothing that can be fine-tuned")
            if not enough:
                member.end(network, request)
    if not torch.equal(randomness, torch.random.get_rng_state()):
        yield Breach("begin", "draws from torch's global generator, or seeds it; make a generator of its own")
    changed, again, rebuilt = networks
    state = changed.state_dict()
    if set(state) != set(before.state_dict()):
        yield Breach("end", f"leaves {min(set(state) ^ set(before.state_dict()))}; expected the network's own tensors")
        return
    if any(value.shape != again.state_dict()[name].shape for name, value in state.items()) or not all(
        torch.equal(value, again.state_dict()[name]) for name, value in state.items()
    ):
        yield Breach("begin", "gives two networks for the same one; a run that is killed has to go on where it was")
    # One that is decided by answers may leave it so.
    if (
        not compared
        and all(torch.equal(value, before.state_dict().get(name, value)) for name, value in state.items() if value.ndim)
        and all(value.shape == before.state_dict()[name].shape for name, value in state.items())
    ):
        yield Breach("begin", "leaves the network as it was")
    whole = shapes_of(before.state_dict())
    with torch.no_grad():
        try:
            reshape(rebuilt, {name: shape for name, shape in shapes_of(state).items() if whole[name] != shape})
            rebuilt.load_state_dict(state)
            answers = rebuilt.eval()(images)[0]
        except (RuntimeError, VisionloopError) as error:
            yield Breach("end", f"leaves a network that the shapes of its tensors do not rebuild: {in_short(error)}")
            return
        if not torch.equal(answers, changed.eval()(images)[0]):
            yield Breach("end", "leaves a network that answers otherwise when it is rebuilt from its tensors")


def finding_breaches(finding: Finding, name: str) -> Iterator[Breach]:
    """It answers the same for the same data in any order and under any names, and changes nothing that it is given."""
    odd = sorted(set(finding.needs) - set(get_args(Need)))
    if odd:
        yield Breach("needs", f"names {odd[0]!r}; expected some of {', '.join(get_args(Need))}")
        return
    known = known_data()
    before = known_data()
    found = finding.look(known)
    if not _same(known, before):
        yield Breach("look", "writes into the data that it is given; make tables and arrays of its own")
        return
    if finding.look(known) != found:
        yield Breach("look", "gives two answers for the same data; it has to depend on nothing else")
        return
    files = {*known.table["path"], *known.refused["path"]}
    for issue in found:
        strange = sorted(set(issue.files) - files)
        if strange:
            yield Breach("look", f"names the file {strange[0]!r}, which is not in the data")
        elif issue.kind != name:
            yield Breach("look", f"finds an issue of kind {issue.kind!r}; expected {name!r}, the name of its file")
        elif issue.score > issue.threshold:
            yield Breach("look", f"finds an issue whose score {issue.score:g} lies above its threshold {issue.threshold:g}")
        elif not (issue.detail.strip() and issue.action.strip()):
            yield Breach("look", "finds an issue without a detail that says what it is, or an action that says what to do")
        else:
            continue
        return
    ids = sorted(issue.id for issue in found)
    if len({*ids}) != len(ids):
        yield Breach("look", "finds two issues about the same files; make one of them, or say in `about` what each is about")
    for what, other in (("in another order", _shuffled(known)), ("under other names", _renamed(known))):
        if sorted(issue.id for issue in finding.look(other)) != ids:
            yield Breach("look", f"finds something else in the same files {what}; a person would be asked again")
            return
    if finding.look(_first_rows(known, 0)):
        yield Breach("look", "finds something in data of no files")


_FILES = 48


def known_data() -> Known:
    """Facts of 48 usable files of two classes and three that are not, among them some of every shipped finding."""
    import pandas as pd

    row = np.arange(_FILES)
    label = np.where(row % 2 == 0, "a", "b")
    label[40] = "c"  # one beside many of the others
    picture = [f"{i:032x}" for i in row]
    picture[2], picture[5] = picture[0], picture[4]
    table = pd.DataFrame(
        {
            "path": [f"{label[i]}/{i:03d}.png" for i in row],
            "label": label,
            "sha256": [f"{i:064x}" for i in row],
            "picture": picture,
            "bytes": np.where(label == "b", 9000, 4000) + 10 * row,
            "format": "PNG",
            "mode": "RGB",
            "width": 64,
            "height": 48,
            "short_side": 48,
            "brightness": 0.4 + 0.002 * row,
            "contrast": 0.2 + 0.001 * row,
            "sharpness": 0.02 + 0.0001 * row,
            "darkest": 0.1 + 0.001 * row,
            "brightest": 0.9 + 0.001 * row,
            "detail": 0.4 + 0.005 * row,
            "profile": "",
            "metadata": 16,
            "behind": 0,
            "behind_is": "",
            "not_served": "",
            "split": np.where(row % 4 == 3, "test", "rest"),
        }
    )
    table.loc[6, ["brightness", "contrast", "brightest", "darkest", "detail"]] = [0.004, 0.002, 0.008, 0.0, 0.0]
    table.loc[14, ["brightness", "contrast", "brightest", "darkest"]] = [0.998, 0.001, 1.0, 0.997]
    table.loc[16, ["contrast", "brightest", "darkest"]] = [0.002, 0.51, 0.49]
    table.loc[8, ["sharpness", "detail"]] = [1e-7, 0.001]
    table.loc[10, ["width", "height", "short_side"]] = [2000, 20, 20]
    table.loc[12, "behind"] = 2000
    table.loc[12, "behind_is"] = "a ZIP archive"
    table.loc[18, "format"] = "JPEG"
    table = table.sort_values("path", ignore_index=True)
    refused = pd.DataFrame(
        {
            "path": ["a/cut.png", "a/text.png", "b/locked.png"],
            "label": ["a", "a", "b"],
            "sha256": [f"{900:064x}", f"{901:064x}", ""],
            "bytes": [100, 12, 0],
            "format": ["PNG", "", ""],
            "reason": ["damaged or truncated", "not an image in an accepted format", "cannot be read (Permission denied)"],
        }
    )
    classes = ("a", "b", "c")
    number = np.array([classes.index(label) for label in table["label"]])
    embeddings = np.random.default_rng(0).normal(size=(_FILES, 8)).astype(np.float32) * 0.1
    embeddings += np.eye(3, 8, dtype=np.float32)[number]
    embeddings[7] = 9.0
    probabilities = np.full((_FILES, 3), 0.002, dtype=np.float32)
    probabilities[np.arange(_FILES), number] = 0.996
    probabilities[9] = np.roll(probabilities[9], 1)
    first = table["path"]
    pairs = (Pair(first[1], first[13], "re-encoded", 0.01), Pair(first[2], first[30], "near", 0.05))
    return Known(table, refused, pairs, embeddings, probabilities, classes)


def _same(one: Known, other: Known) -> bool:
    arrays = ((one.embeddings, other.embeddings), (one.probabilities, other.probabilities))
    return (
        one.table.equals(other.table)
        and one.refused.equals(other.refused)
        and one.pairs == other.pairs
        and all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in arrays)
    )


def _of_rows(known: Known, chosen: npt.NDArray[np.intp], table: pd.DataFrame) -> Known:
    assert known.embeddings is not None
    assert known.probabilities is not None
    return dataclasses.replace(
        known, table=table, embeddings=known.embeddings[chosen], probabilities=known.probabilities[chosen]
    )


def _shuffled(known: Known) -> Known:
    order = np.random.default_rng(1).permutation(len(known.table))
    return _of_rows(known, order, known.table.iloc[order].reset_index(drop=True))


def _renamed(known: Known) -> Known:
    """Every file by another name, so that their order by name is another one, too."""

    def name(path: str) -> str:
        label, file = path.split("/")
        return f"{label}/{file[::-1].replace('.', '')}.png"

    table = known.table.assign(path=[name(path) for path in known.table["path"]])
    order = np.argsort(table["path"].to_numpy(str), kind="stable")
    refused = known.refused.copy()
    refused.loc[:1, "path"] = [name(path) for path in refused["path"][:2]]
    pairs = tuple(dataclasses.replace(pair, first=name(pair.first), second=name(pair.second)) for pair in known.pairs or ())
    renamed = _of_rows(known, order, table.iloc[order].reset_index(drop=True))
    return dataclasses.replace(renamed, refused=refused, pairs=pairs)


def _first_rows(known: Known, number: int) -> Known:
    cut = _of_rows(known, np.arange(number), known.table.iloc[:number])
    return dataclasses.replace(cut, refused=known.refused.iloc[:0], pairs=())


def target_breaches(target: Target, name: str) -> Iterator[Breach]:
    """An engine that it builds of a small network answers like the network, for any batch.

    Raises EngineUnavailable where this machine cannot build or execute it.
    """
    import torch

    precisions = tuple(target.precisions)
    odd = [precision for precision in precisions if precision not in get_args(Precision)]
    if odd or not precisions:
        yield Breach("precisions", f"names {odd or 'none'}; expected some of {', '.join(get_args(Precision))}")
        return
    if target.absent():
        raise EngineUnavailable(target.absent())
    precision = "fp32" if "fp32" in precisions else precisions[0]
    images = np.random.default_rng(0).integers(0, 255, (7, 16, 16, 1), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, module = _network(Path(folder))
        graph, out = Path(folder) / "graph.onnx", Path(folder) / "engine"
        from components.graphs import to_onnx

        to_onnx(module, checkpoint.record.preprocessing, graph)
        out.mkdir()
        task: Task = plugins.load("tasks", "classification")
        targets = task.targets(list("abcabca"), checkpoint.record.classes)
        request = ExportRequest(
            checkpoint, graph, precision, lambda: iter([images]), lambda: iter([(images, targets)]), task
        )
        built = target.export(request, out=out)
        if not (out / built.entry).exists():
            yield Breach("export", f"names the entry {built.entry!r}, which it did not write into `out`")
            return
        engine = _engine().model_copy(
            update={
                "name": f"{name}-{precision}",
                "target": name,
                "precision": precision,
                "checkpoint_digest": checkpoint.record.digest(),
                "files": tuple(describe(path, within=out) for path in sorted(out.rglob("*")) if path.is_file()),
                "entry": built.entry,
                "preprocessing": checkpoint.record.preprocessing,
                "classes": checkpoint.record.classes,
                "embedding_dim": checkpoint.record.embedding_dim,
                "runtime": built.runtime,
                "built_for": built.built_for,
                "facts": dict(built.facts),
            }
        )
        predictor = target.load(Stored(engine, out), num_threads=1)
        logits, embedding = predictor.predict(images)
        with torch.inference_mode():
            expected = tuple(part.numpy() for part in module(torch.from_numpy(images)))
        for what, found, wanted in (("logits", logits, expected[0]), ("embeddings", embedding, expected[1])):
            if found.shape != wanted.shape or found.dtype != np.float32:
                yield Breach(
                    "load", f"answers {what} {found.shape} of {found.dtype} to 7 images; expected {wanted.shape} of float32"
                )
                return
            apart = float(np.abs(found - wanted).max())
            if precision == "fp32" and not apart < 1e-3:
                yield Breach(
                    "load", f"its {what} are up to {apart:.2g} from the network's; expected less than 0.001 for fp32"
                )
        single = np.concatenate([predictor.predict(images[i : i + 1])[0] for i in range(7)])
        apart = float(np.abs(single - logits).max())
        if not apart < (1e-3 if precision == "fp32" else 0.2):
            yield Breach("load", f"answers a picture otherwise alone than beside others: logits up to {apart:.2g} apart")


def _network(folder: Path, width: int = 4) -> tuple[Stored[Checkpoint], Any]:
    """A small untrained network, and its checkpoint in `folder`."""
    import torch

    from components.checkpoints import assemble, save_weights

    settings: dict[str, bool | int | float | str] = {"image_size": 16, "width": width, "embedding_dim": 8}
    backbone: Backbone = plugins.load("backbones", "small_cnn", settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = assemble(backbone, plugins.load("tasks", "classification"), 3).eval()
    record = Checkpoint(
        splits_digest="s" * 64,
        task="classification",
        task_settings={},
        backbone="small_cnn",
        backbone_settings=settings,
        preprocessing=backbone.preprocessing,
        classes=("a", "b", "c"),
        embedding_dim=backbone.embedding_dim,
        weights=save_weights(module.state_dict(), out=folder),
        history=FileDigest(name="history.json", sha256="0" * 64, bytes=0),
        temperature=1.0,
        best_epoch=1,
        epochs=1,
        valid_metrics={},
    )
    return Stored(record, folder), module


PROBES: Mapping[str, Callable[[Any, str], Iterator[Breach]]] = {
    "sources": source_breaches,
    "findings": finding_breaches,
    "gates": gate_breaches,
    "losses": loss_breaches,
    "augmentations": augmentation_breaches,
    "passes": pass_breaches,
    "backbones": backbone_breaches,
    "tasks": task_breaches,
    "targets": target_breaches,
}
"""By family: a member and its name to what it does against the contract."""
