"""An engine in a bundle answers as it does in the server, and nothing of a bundle is read that was changed."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms
from safetensors.numpy import load_file
from served import as_served, encoded, exif_rotated, jpeg, png, smoke_release, unpacked

from components import bundles, engine_files, int8_arithmetic, plugins, signatures
from components.bundles import Bundle, Contents, write
from components.colours import matrix_profile
from components.contracts.errors import ConfigError, EngineUnavailable, SchemaTooNew, StoreError, TamperedArtefact
from components.contracts.models import Engine, Preprocessing
from components.contracts.records import Stored
from components.contracts.releases import NEVER, Release
from components.formats import Accepted
from components.images import decode, prepare
from components.releases import GOLDEN
from components.store import Store, describe, seal, unseal

HERE = Path(__file__).parent
ADOBE = matrix_profile((0.3127, 0.329, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06), 563 / 256)


def contents(release: Stored[Release], engine: Stored[Engine] | None = None) -> Contents:
    record = release.record
    golden = load_file(release.folder / GOLDEN)
    return Contents(
        model="shapes",
        version="1",
        standing="champion",
        engine=engine or Stored(record.engine, release.folder / "engine"),
        task=record.task,
        task_settings=record.task_settings,
        threshold=record.decision.threshold if engine is None else None,
        pictures=[golden[f"encoded.{index:03d}"].tobytes() for index in range(4)],
        probabilities=golden["probabilities"][:4] if engine is None else None,
        card="# A model\n",
        licences="# Licences\n",
        made_by="visionloop of the tests",
    )


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a champion, which an older commit made: nothing is trained for these tests."""
    return unpacked(tmp_path_factory.mktemp("older"))


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return signatures.own_key(tmp_path_factory.mktemp("keys") / "signing")


@pytest.fixture(scope="module")
def release(older: Path) -> Stored[Release]:
    return smoke_release(older)


@pytest.fixture(scope="module")
def onnx_engine(older: Path) -> Stored[Engine]:
    (folder,) = (older / ".visionloop" / "store" / "export" / "onnxruntime-fp32").iterdir()
    found = Store(older / ".visionloop" / "store").open("export/onnxruntime-fp32", folder.name, Engine)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def written(release: Stored[Release], key: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the serving engine; copy it, never change it."""
    out = tmp_path_factory.mktemp("bundles") / "bundle"
    bundles.write(contents(release), out, key=key, num_threads=1)
    return out


@pytest.fixture
def own(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "own"))


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def resealed(folder: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> Path:
    """The folder, its manifest made anew for what lies in it now, as somebody without any key can."""
    body = unseal((folder / "manifest.json").read_bytes())
    assert body is not None
    listed = [path for path in files_of(folder) if path.name not in ("manifest.json", "signature.json")]
    body["files"] = [describe(path, within=folder).to_json() for path in listed]
    body["record"]["engine"]["files"] = [
        describe(path, within=folder / "engine").to_json() for path in files_of(folder / "engine")
    ]
    change(body["record"])
    body.pop("manifest_sha256", None)
    (folder / "manifest.json").write_bytes(seal(body))
    return folder


def resigned(folder: Path, key: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> Path:
    """The folder, its manifest and signature made anew, as somebody with a key of his own can."""
    (folder / "signature.json").unlink()
    (folder / "signer.pub").write_bytes(signatures.public_key(key))
    signatures.sign(resealed(folder, change), folder / "signature.json", key)
    return folder


def odd_pictures() -> dict[str, bytes]:
    """What cameras, scanners and editors write: each takes another way through the decoder."""
    rng = np.random.default_rng(5)
    rgb = Image.fromarray(np.asarray(Image.fromarray(rng.integers(0, 255, (7, 9, 3), dtype=np.uint8)).resize((90, 70))))
    alpha = rgb.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(rgb.size))
    palette = rgb.quantize(17)
    deep = Image.fromarray(rng.integers(0, 65535, (70, 90), dtype=np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "plain.png": encoded(rgb, "PNG"),
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "palette.png": encoded(palette, "PNG", transparency=3),
        "deep.png": encoded(deep, "PNG"),
        "deep.tif": encoded(deep, "TIFF"),
        "turned.jpg": encoded(rgb, "JPEG", exif=exif),
        "alpha.png": encoded(alpha, "PNG"),
        "alpha.webp": encoded(alpha, "WEBP", lossless=True),
        "grey-alpha.png": encoded(alpha.convert("LA"), "PNG"),
        "adobe.jpg": encoded(rgb, "JPEG", icc_profile=ADOBE),
        "adobe-alpha.png": encoded(alpha, "PNG", icc_profile=ADOBE),
        "lab-profile.png": encoded(
            rgb, "PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
        ),
        "bits.png": encoded(rgb.convert("1"), "PNG"),
        "long.bmp": encoded(rgb.resize((900, 20)), "BMP"),
        **{path.name: path.read_bytes() for path in sorted(HERE.glob("*.golden.jpg"))},
    }


@contextlib.contextmanager
def runner_of(folder: Path) -> Iterator[ModuleType]:
    """The decoder that a bundle carries, imported as its program does."""
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module("runner.images")
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] == "runner"]:
            del sys.modules[name]


@pytest.mark.parametrize("colour", ["srgb", "as stored"])
@pytest.mark.parametrize(("channels", "interpolation"), [(3, "bicubic"), (3, "bilinear"), (1, "bilinear")])
def test_the_bundle_prepares_pictures_to_the_same_bits(own: Path, colour: Any, channels: Any, interpolation: Any) -> None:
    preprocessing = Preprocessing(
        channels=channels,
        height=32,
        width=32,
        resize_shortest=37,
        interpolation=interpolation,
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
        colour=colour,
    )
    with runner_of(own) as theirs:
        assert Path(str(theirs.__file__)).is_relative_to(own)
        for name, data in odd_pictures().items():
            found = theirs.prepare(theirs.decode(data, Accepted()), preprocessing)
            assert (found == prepare(decode(data, Accepted()), preprocessing)).all(), name


def predict(folder: Path, *arguments: str | Path, status: int = 0, python: str = sys.executable) -> Any:
    done = subprocess.run(
        [python, str(folder / "predict.py"), *map(str, arguments), "--json"],
        capture_output=True,
        text=True,
        cwd=folder.parent,
    )
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout) if done.stdout else done.stderr


def write_all(folder: Path) -> list[Path]:
    pictures = odd_pictures() | {"disc.png": png("disc", 7), "disc.jpg": jpeg(), "side.jpg": exif_rotated("cross", 3)}
    folder.mkdir()
    for name, data in pictures.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in pictures]


def test_the_program_of_a_bundle_answers_as_the_server(own: Path, release: Stored[Release], tmp_path: Path) -> None:
    paths = write_all(tmp_path / "pictures")
    found = predict(own, "--check", *paths)
    expected = as_served(release, [path.read_bytes() for path in paths])
    assert [answer["label"] for answer in found["answers"]] == [label for label, _ in expected]
    assert [answer["confidence"] for answer in found["answers"]] == pytest.approx([share for _, share in expected], abs=1e-4)
    threshold = release.record.decision.threshold
    assert [answer["unsure"] for answer in found["answers"]] == [share < threshold for _, share in expected]
    assert found["golden"]["right"]
    assert (found["golden"]["pictures"], found["golden"]["largest_pixel_difference"]) == (4, 0)
    # It left nothing behind that would make another bundle of it.
    bundles.verified(own)


def test_the_program_of_a_bundle_asks_more_of_a_critical_class(
    own: Path, release: Stored[Release], key: Path, tmp_path: Path
) -> None:
    record = write(
        dataclasses.replace(contents(release), threshold=0.0, class_thresholds={"disc": NEVER}),
        tmp_path / "critical",
        key=key,
        num_threads=1,
    )
    paths = write_all(tmp_path / "pictures")
    answers = predict(tmp_path / "critical", *paths)["answers"]
    assert len({answer["label"] for answer in answers}) > 1
    assert [answer["unsure"] for answer in answers] == [answer["label"] == "disc" for answer in answers]
    assert record.to_json()["class_thresholds"] == {"disc": NEVER}
    assert "class_thresholds" not in json.loads((own / "manifest.json").read_text())["record"]


def test_the_program_tells_what_it_cannot_answer(own: Path, tmp_path: Path) -> None:
    (tmp_path / "no.png").write_bytes(b"GIF89a")
    (tmp_path / "disc.png").write_bytes(png("disc", 7))
    found = predict(own, tmp_path / "no.png", tmp_path / "away.png", tmp_path / "disc.png", status=2)
    wrong, away, right = found["answers"]
    assert "a GIF, which is not an accepted format" in wrong["error"]
    assert "No such file" in away["error"]
    assert right["label"] == "disc"
    assert "it is a folder; name its pictures" in predict(own, tmp_path, status=2)["answers"][0]["error"]
    # A file that is called like a module of Python's own, or like a runtime that is not installed, is not imported.
    (own / "json.py").write_text("raise SystemExit(7)")
    assert "this bundle is damaged: json.py does not belong to it" in predict(own, tmp_path / "disc.png", status=2)
    (own / "json.py").rename(own / "notes.txt")
    assert predict(own, tmp_path / "disc.png")["answers"] == [right]
    (own / "runner" / "colours.py").write_text("raise SystemExit(7)\n")
    assert "this bundle is damaged: runner/colours.py" in predict(own, tmp_path / "disc.png", status=2)


def changed(folder: Path) -> None:
    path = folder / "engine" / "model.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"X")


def cut(folder: Path) -> None:
    os.truncate(folder / "golden" / "logits.npy", 100)


def linked(folder: Path) -> None:
    (folder / "engine" / "model.bin").rename(folder / "elsewhere.bin")
    (folder / "engine" / "model.bin").symlink_to(folder / "elsewhere.bin")


def added(folder: Path) -> None:
    (folder / "runner" / "numpy.py").write_text("raise SystemExit(7)")


def added_by_a_link(folder: Path) -> None:
    (folder / "runner" / "numpy").symlink_to(folder / "golden")


def of_tomorrow(folder: Path) -> None:
    resealed(folder, lambda record: record.update(schema_version=2))


def program_of(folder: Path) -> Any:
    """The bundle's predict.py as a module, none of its libraries loaded."""
    spec = importlib.util.spec_from_file_location("program_of_a_bundle", folder / "predict.py")
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (changed, r"engine/model\.bin was changed"),
        (cut, r"golden/logits\.npy is missing, a link, or of another size"),
        (linked, r"engine/model\.bin is missing, a link, or of another size"),
        (added, r"runner/numpy\.py does not belong to it"),
        (added_by_a_link, "runner/numpy does not belong to it"),
        (lambda folder: (folder / "labels.txt").unlink(), r"labels\.txt is missing"),
        (lambda folder: os.truncate(folder / "manifest.json", 99), r"manifest\.json cannot be read"),
        (
            lambda folder: (folder / "manifest.json").write_bytes(
                (folder / "manifest.json").read_bytes().replace(b"champion", b"Champion")
            ),
            r"manifest\.json was changed",
        ),
        (of_tomorrow, "a bundle of format 2; this program reads up to 1"),
    ],
)
def test_the_program_itself_refuses_what_is_not_as_it_was(own: Path, change: Callable[[Path], None], what: str) -> None:
    change(own)
    program = program_of(own)
    with pytest.raises(program.Damaged, match=what):
        program.verified(own)


def test_the_program_accepts_no_more_than_the_command_does(own: Path) -> None:
    """It stands alone, so that it says these figures again."""
    program = program_of(own)
    for name in ("_PIXEL_TOLERANCE", "_LOSSLESS", "_LOSSLESS_TOLERANCE"):
        assert getattr(program, name) == getattr(bundles, name)


def test_the_program_tells_each_answer_at_once_and_stops_without_a_traceback(own: Path, tmp_path: Path) -> None:
    disc, waited_for = tmp_path / "disc.png", tmp_path / "waited-for.png"
    disc.write_bytes(png("disc", 7))
    os.mkfifo(waited_for)
    program = subprocess.Popen(
        [sys.executable, str(own / "predict.py"), str(disc), str(waited_for)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert program.stdout is not None
    # The pipe opens when the program comes to the second picture. The first answer has to be there by then.
    with waited_for.open("wb"):
        ready, _, _ = select.select([program.stdout], [], [], 0)
        program.send_signal(signal.SIGINT)
        out, err = program.communicate()
    assert (bool(ready), out.split(" ")[:2], err) == (True, [f"{disc}:", "disc"], "")
    assert program.returncode == -signal.SIGINT


def test_the_program_tells_what_its_runtime_refuses(own: Path, key: Path) -> None:
    (entry,) = (own / "engine").glob("*.xml")
    entry.write_text("<net/>")
    refused = predict(resigned(own, key), "--check", status=2)
    assert "error: the runtime refused the engine, which openvino " in refused
    assert "python -m pip install -r" in refused
    assert "Traceback" not in refused
    assert "--threads 0: expected 1 or more" in predict(own, "--check", "--threads", "0", status=2)


def test_a_bundle_of_an_onnx_engine_opens_as_a_zip(
    onnx_engine: Stored[Engine], release: Stored[Release], key: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bundle.zip"
    bundles.write(contents(release, onnx_engine), out, key=key, num_threads=1)
    assert list(tmp_path.iterdir()) == [out]
    with bundles.opened(out, key=key.with_name("key.pub")) as found:
        assert found.origin_proven
        answered = bundles.answer_golden(found, num_threads=1)
        assert (answered.problem, answered.pictures) == ("", 4)
        assert predict(found.folder, "--check")["golden"]["right"]
    with zipfile.ZipFile(out) as archive:
        names = archive.namelist()
    assert {"predict.py", "requirements.txt", "runner/onnxruntime.py", "LICENCES.md", "labels.txt"} <= set(names)
    assert f"onnxruntime=={onnx_engine.record.runtime.split()[1]}" in zipfile.ZipFile(out).read("requirements.txt").decode()
    # Every flip in the archive is refused, or in what a zip says of its files and not in them.
    raw, rng = out.read_bytes(), np.random.default_rng(3)
    before = {name: zipfile.ZipFile(out).read(name) for name in names}
    refused = 0
    for place in rng.integers(0, len(raw) * 8, 60):
        changed = bytearray(raw)
        changed[place // 8] ^= 1 << int(place % 8)
        out.write_bytes(changed)
        try:
            with bundles.opened(out) as found:
                assert {
                    path.relative_to(found.folder).as_posix(): path.read_bytes() for path in files_of(found.folder)
                } == before
        except TamperedArtefact:
            refused += 1
    assert refused > 40


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that parses the files of a bundle may be reached."""

    def reached(*_: Any, **__: Any) -> Any:
        raise AssertionError("a parser was reached")

    monkeypatch.setattr(engine_files, "inspect", reached)
    monkeypatch.setattr(plugins, "load", reached)
    monkeypatch.setattr(Bundle, "read", reached)


@pytest.mark.usefixtures("unread")
def test_every_flipped_bit_is_refused_before_anything_is_parsed(own: Path) -> None:
    paths = files_of(own)
    sizes = np.array([path.stat().st_size for path in paths])
    rng = np.random.default_rng(1)
    # Half of them anywhere, half in a file drawn first: the small ones are a thousandth of the bytes.
    drawn = [*rng.choice(len(paths), 500, p=sizes / sizes.sum()), *rng.integers(0, len(paths), 500)]
    for index in drawn:
        path, place = paths[index], int(rng.integers(0, sizes[index] * 8))
        with path.open("r+b") as file:
            file.seek(place // 8)
            (byte,) = file.read(1)
            file.seek(place // 8)
            file.write(bytes([byte ^ (1 << place % 8)]))
            file.flush()
            with pytest.raises((TamperedArtefact, ConfigError)):
                bundles.verified(own)
            file.seek(place // 8)
            file.write(bytes([byte]))
    with pytest.raises(AssertionError, match="a parser was reached"):
        bundles.verified(own)  # as it was


@pytest.mark.usefixtures("unread")
def test_what_was_cut_swapped_added_removed_or_linked_is_refused(own: Path, tmp_path: Path) -> None:
    def refused(what: str | None = None) -> None:
        with pytest.raises((TamperedArtefact, ConfigError), match=what):
            with bundles.opened(own):
                pass

    rng = np.random.default_rng(2)
    for path in files_of(own):
        data = path.read_bytes()
        for kept in {0, len(data) - 1, int(rng.integers(0, len(data)))}:
            path.write_bytes(data[:kept])
            refused()
        path.unlink()
        refused()
        path.write_bytes(data)
    golden = sorted((own / "golden").glob("*.png"))
    for one, other in [(golden[0], golden[1]), (own / "labels.txt", own / "requirements.txt")]:
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second)
        other.write_bytes(first)
        refused(f"{one.relative_to(own).as_posix()} was changed")
        one.write_bytes(first)
        other.write_bytes(second)
    labels = (own / "labels.txt").read_bytes()
    (own / "labels.txt").write_bytes(labels.swapcase())
    refused("labels.txt was changed")
    (own / "labels.txt").write_bytes(labels)
    for name in ("more.txt", ".hidden", "engine/.gitignore", "runner/__pycache__/images.cpython-311.pyc", "golden/004.png"):
        path = own / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
        refused("files were added")
        path.unlink()
        if path.parent.name == "__pycache__":
            path.parent.rmdir()
    target = own / "engine" / "model.bin"
    elsewhere = tmp_path / "elsewhere.bin"
    target.rename(elsewhere)
    target.symlink_to(elsewhere)
    refused("engine/model.bin is a link or a special file")
    target.unlink()
    elsewhere.rename(target)
    (own / "golden").rename(tmp_path / "golden")
    (own / "golden").symlink_to(tmp_path / "golden")
    refused("golden is a link or a special file")
    (own / "golden").unlink()
    (tmp_path / "golden").rename(own / "golden")
    os.mkfifo(own / "pipe")
    refused("pipe is a link or a special file")
    (own / "pipe").unlink()
    with pytest.raises(AssertionError, match="a parser was reached"), bundles.opened(own):
        pass  # as it was


@pytest.mark.usefixtures("unread")
def test_archives_that_lead_elsewhere_or_are_no_bundles_are_refused(written: Path, tmp_path: Path) -> None:
    def packed(name: str, data: bytes = b"x", mode: int = 0o100644) -> Path:
        out = tmp_path / "hostile.zip"
        with zipfile.ZipFile(out, "w") as archive:
            for path in files_of(written):
                archive.write(path, path.relative_to(written).as_posix())
            entry = zipfile.ZipInfo(name)
            entry.external_attr = mode << 16
            archive.writestr(entry, data)
        return out

    for name, mode in (("../out.txt", 0o100644), ("/etc/x", 0o100644), ("link", 0o120777), ("Manifest.json", 0o100644)):
        with pytest.raises(TamperedArtefact), bundles.opened(packed(name, b"/etc/passwd", mode)):
            pass
    assert not (tmp_path / "out.txt").exists()
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(TamperedArtefact, match="neither a folder nor a zip"), bundles.opened(tmp_path / "text.zip"):
        pass
    with pytest.raises(StoreError, match="is not there"), bundles.opened(tmp_path / "away"):
        pass


@pytest.mark.usefixtures("unread")
def test_a_manifest_that_was_made_anew_without_a_key_is_refused(own: Path) -> None:
    """Its digests are right, and so is its seal: the signature alone tells."""

    def sure(record: dict[str, Any]) -> None:
        record["threshold"] = 0.0

    card = own / "model-card.md"
    for change, text in ((sure, card.read_text()), (lambda _: None, "# Another model\n")):
        before = {path: path.read_bytes() for path in files_of(own)}
        card.write_text(text)
        resealed(own, change)
        with pytest.raises(TamperedArtefact, match=r"not signed by the key signer\.pub"), bundles.opened(own):
            pass
        for path, data in before.items():
            path.write_bytes(data)
    body = unseal((own / "manifest.json").read_bytes())
    assert body is not None
    (own / "manifest.json").write_bytes(seal(body | {"kind": "export"}))
    with pytest.raises(TamperedArtefact, match="it is of the kind 'export'; expected 'engine bundle'"):
        bundles.verified(own)
    (own / "signature.json").unlink()
    with pytest.raises(TamperedArtefact, match=r"has no signature\.json; it is no bundle, or not a whole one"):
        bundles.verified(own)


@pytest.mark.usefixtures("unread")
def test_what_is_larger_than_a_bundle_may_be_is_refused_unread(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(what: str, key: Path | None = None) -> None:
        with pytest.raises((TamperedArtefact, ConfigError), match=what), bundles.opened(own, key=key):
            pass

    os.truncate(Path(shutil.copy(own / "signer.pub", tmp_path / "long.pub")), signatures.MAX_BYTES + 1)
    refused("not a public key in PEM .more than 4194304 bytes", tmp_path / "long.pub")
    for name, what in (("signature", "the signature has more than"), ("manifest", "manifest.json has more than")):
        kept = (own / f"{name}.json").read_bytes()
        os.truncate(own / f"{name}.json", signatures.MAX_BYTES + 1)
        refused(what)
        (own / f"{name}.json").write_bytes(kept)
    (own / "many").mkdir()
    for index in range(bundles.MAX_FILES):
        (own / "many" / str(index)).touch()
    refused("more than 1000 files and folders")
    packed = tmp_path / "many.zip"
    bundles._pack(own, packed)
    with pytest.raises(TamperedArtefact, match="more than 1000 files and folders"), bundles.opened(packed):
        pass
    shutil.rmtree(own / "many")
    monkeypatch.setattr(bundles, "MAX_GB", 0)
    refused("it has more than 0 GB")


def test_a_bundle_that_somebody_else_signed_is_told_from_the_makers(own: Path, key: Path, tmp_path: Path) -> None:
    stranger = signatures.own_key(tmp_path / "stranger")
    (own / "model-card.md").write_text("# Another model\n")
    resigned(own, stranger)
    with bundles.opened(own) as found:
        assert (found.origin_proven, found.signer) == (False, signatures.fingerprint(signatures.public_key(stranger)))
    with pytest.raises(TamperedArtefact, match="not signed by the key key.pub"):
        with bundles.opened(own, key=key.with_name("key.pub")):
            pass
    with pytest.raises(ConfigError, match="not a public key in PEM"), bundles.opened(own, key=own / "labels.txt"):
        pass
    with pytest.raises(ConfigError, match="is not a private key"):
        signatures.sign(own, own / "signature.json", own / "labels.txt")


def test_the_key_is_made_once_and_is_its_owners_alone(tmp_path: Path) -> None:
    key = signatures.own_key(tmp_path / "signing")
    assert key.stat().st_mode & 0o777 == 0o600
    made = key.read_bytes()
    assert signatures.own_key(tmp_path / "signing").read_bytes() == made
    assert {path.name for path in key.parent.iterdir()} == {"key.pem", "key.pub"}


def test_answers_that_moved_and_records_that_disagree_are_refused(own: Path, key: Path, tmp_path: Path) -> None:
    """Signed well, and wrong all the same."""
    logits = np.load(own / "golden" / "logits.npy")
    np.save(own / "golden" / "logits.npy", logits[:, ::-1])
    with bundles.opened(resigned(own, key)) as found:
        assert (
            "answers its golden vectors wrongly here: a logit differs by"
            in bundles.answer_golden(found, num_threads=1).problem
        )
    np.save(own / "golden" / "logits.npy", logits)
    inputs = np.load(own / "golden" / "inputs.npy")
    np.save(own / "golden" / "inputs.npy", inputs[:, ::-1])
    with bundles.opened(resigned(own, key)) as found:
        assert "decodes to other pixels here" in bundles.answer_golden(found, num_threads=1).problem
    np.save(own / "golden" / "inputs.npy", inputs[:, :8])
    with bundles.opened(resigned(own, key)) as found, pytest.raises(TamperedArtefact, match="golden inputs are"):
        bundles.answer_golden(found, num_threads=1)
    np.save(own / "golden" / "inputs.npy", inputs)

    def with_other_resize(record: dict[str, Any]) -> None:
        record["engine"]["preprocessing"]["resize_shortest"] = 20

    def with_other_labels(record: dict[str, Any]) -> None:
        record["engine"]["classes"] = ["disc", "cross", "stripes"]

    def with_fewer_pictures(record: dict[str, Any]) -> None:
        record["golden"] = record["golden"][:3]

    def with_entry_elsewhere(record: dict[str, Any]) -> None:
        record["engine"]["entry"] = "../../model.xml"

    for change, what in (
        (with_other_resize, "fingerprint of the preprocessing"),
        (with_other_labels, "labels.txt does not name the engine's classes"),
        (with_fewer_pictures, "golden pictures are not those of its record"),
        (with_entry_elsewhere, "engine's files are not those of its record"),
    ):
        changed = resigned(Path(shutil.copytree(own, tmp_path / change.__name__)), key, change)
        with pytest.raises(TamperedArtefact, match=what), bundles.opened(changed):
            pass

    def of_tomorrow(record: dict[str, Any]) -> None:
        record["schema_version"] = 2

    with pytest.raises(SchemaTooNew, match="upgrade visionloop"), bundles.opened(resigned(own, key, of_tomorrow)):
        pass


def test_xml_that_leads_elsewhere_is_refused_before_openvino_sees_it(own: Path, key: Path, tmp_path: Path) -> None:
    path = own / "engine" / "model.xml"
    text = path.read_text()
    declaration = '<?xml version="1.0"?>'
    assert text.startswith(declaration)
    entity = f'{declaration}<!DOCTYPE net [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
    outside = "a constant that lies outside of model.bin"
    cases = [
        ("a document type", text.replace(declaration, entity)),
        ("an instruction for other programs", text.replace(declaration, declaration + '<?xml-stylesheet href="x"?>')),
        ("a layer of the extension 'extension'", text.replace('version="opset1"', 'version="extension"', 1)),
        (outside, text.replace('offset="0"', 'offset="99999999"', 1)),
        (outside, text.replace('offset="0"', 'offset="-1"', 1)),
        (outside, text.replace('offset="0"', 'offset="0x0"', 1)),
        ("elements more than 64 deep", text.replace("<layers>", "<layers>" + "<a>" * 70 + "</a>" * 70)),
        ("is no XML", text[:500]),
    ]
    for what, changed in cases:
        assert changed != text
        path.write_text(changed)
        with pytest.raises(TamperedArtefact, match=what), bundles.opened(resigned(own, key)):
            pass
    path.write_text(text)
    (own / "engine" / "plan").write_bytes(b"ftrt")
    with pytest.raises(TamperedArtefact, match="may hold code; name the public key"), bundles.opened(resigned(own, key)):
        pass
    with bundles.opened(own, key=key.with_name("key.pub")):
        pass


def test_a_graph_under_the_name_of_weights_is_not_opened(own: Path, key: Path, onnx_engine: Stored[Engine]) -> None:
    """Runtimes go by what a file holds: OpenVINO and ONNX Runtime open it all the same, and TensorRT a program."""
    shutil.copyfile(onnx_engine.folder / "model.onnx", own / "engine" / "payload.bin")
    resigned(own, key, lambda record: record["engine"].update(entry="payload.bin"))
    with pytest.raises(TamperedArtefact, match=r"payload\.bin is of a kind that cannot be looked into"), bundles.opened(own):
        pass
    with bundles.opened(own, key=key.with_name("key.pub")) as found:
        assert bundles.answer_golden(found, num_threads=1).pictures == 4


@pytest.mark.parametrize(("name", "most"), [("model.onnx", "_MAX_GRAPH"), ("model.xml", "_MAX_XML")])
def test_a_graph_that_is_larger_than_one_can_be_is_not_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, most: str
) -> None:
    monkeypatch.setattr(engine_files, most, 1000)
    (tmp_path / name).write_bytes(bytes(1001))
    with pytest.raises(TamperedArtefact, match=f"{name} has more than 1000 bytes"):
        engine_files.inspect(tmp_path / name, is_entry=True)


def test_onnx_that_leads_elsewhere_is_refused_before_a_runtime_sees_it(onnx_engine: Stored[Engine], tmp_path: Path) -> None:
    import onnx

    file = tmp_path / "model.onnx"
    original = (onnx_engine.folder / "model.onnx").read_bytes()

    def refused(change: Callable[[Any], None], what: str) -> None:
        model = onnx.ModelProto.FromString(original)
        change(model)
        file.write_bytes(model.SerializeToString())
        with pytest.raises(TamperedArtefact, match=what):
            engine_files.inspect(file, is_entry=True)

    def point(tensor: Any) -> None:
        tensor.external_data.add(key="location", value="../../etc/passwd")

    def inside_a_branch(model: Any) -> None:
        inner = onnx.helper.make_graph([], "inner", [], [])
        point(inner.initializer.add(name="hidden"))
        model.graph.node.add(op_type="If").attribute.append(onnx.helper.make_attribute("then_branch", inner))

    def in_an_attribute(model: Any) -> None:
        constant = onnx.helper.make_node("Constant", [], ["c"], value=onnx.TensorProto(name="hidden"))
        point(constant.attribute[0].t)
        model.graph.node.append(constant)

    def attribute_of(model: Any) -> Any:
        return model.graph.node.add(op_type="Constant").attribute.add(name="value")

    def in_a_function(model: Any) -> None:
        function = model.functions.add(name="f", domain="own")
        point(function.node.add(op_type="Constant").attribute.add(name="value").t)

    def in_a_list_of_graphs(model: Any) -> None:
        point(attribute_of(model).graphs.add().initializer.add(name="hidden"))

    def for_training(model: Any) -> None:
        point(model.training_info.add().algorithm.initializer.add(name="hidden"))

    def deep(model: Any) -> None:
        graph = model.graph
        for _ in range(70):
            attribute = graph.node.add(op_type="If").attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH)
            attribute.g.name = "g"
            graph = attribute.g

    assert engine_files.inspect(onnx_engine.folder / "model.onnx", is_entry=True)
    refused(lambda model: point(model.graph.initializer[0]), r"in another file \(../../etc/passwd\)")
    refused(lambda model: setattr(model.graph.initializer[0], "data_location", 1), r"in another file \(unnamed\)")
    refused(lambda model: point(model.graph.sparse_initializer.add().values), "in another file")
    refused(lambda model: point(model.graph.sparse_initializer.add().indices), "in another file")
    refused(lambda model: point(attribute_of(model).tensors.add()), "in another file")
    refused(lambda model: point(attribute_of(model).sparse_tensor.values), "in another file")
    refused(lambda model: point(attribute_of(model).sparse_tensors.add().indices), "in another file")
    refused(in_a_function, "in another file")
    refused(in_a_list_of_graphs, "keeps 'hidden' in another file")
    refused(inside_a_branch, "keeps 'hidden' in another file")
    refused(in_an_attribute, "keeps 'hidden' in another file")
    refused(for_training, "keeps 'hidden' in another file")
    refused(lambda model: setattr(model.graph.node[0], "domain", "evil.ops"), "operator .* of 'evil.ops'")
    refused(deep, "is no ONNX")
    file.write_bytes(original[: len(original) // 2])
    with pytest.raises(TamperedArtefact, match="is no ONNX"):
        engine_files.inspect(file, is_entry=True)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_file_that_was_built_for_other_pictures_than_its_record_says_is_not_loaded(
    onnx_engine: Stored[Engine], tmp_path: Path, target: str
) -> None:
    """Evaluator, server and bundles load by the target, and so refuse it all three."""
    import onnx
    import openvino

    model = onnx.load(onnx_engine.folder / "model.onnx")
    fingerprint = onnx_engine.record.preprocessing.digest()
    onnx.helper.set_model_props(model, {"visionloop.preprocessing": fingerprint})
    onnx.save(model, tmp_path / "model.onnx")
    entry = "model.onnx"
    if target == "openvino":
        read = openvino.Core().read_model(tmp_path / "model.onnx")
        read.set_rt_info(fingerprint, ["visionloop", "preprocessing"])
        openvino.save_model(read, tmp_path / "model.xml", compress_to_fp16=False)
        entry = "model.xml"
    record = onnx_engine.record.model_copy(update={"entry": entry, "target": target})
    image = np.zeros((1, 16, 16, 1), dtype=np.uint8)
    logits, _ = plugins.load("targets", target).load(Stored(record, tmp_path), num_threads=1).predict(image)
    assert logits.shape == (1, 3)
    wider = record.preprocessing.model_copy(update={"resize_shortest": 20})
    other = Stored(record.model_copy(update={"preprocessing": wider}), tmp_path)
    with pytest.raises(EngineUnavailable, match="built for pictures that are prepared otherwise"):
        plugins.load("targets", target).load(other, num_threads=1)


def test_an_engine_that_cannot_run_here_is_told_with_both_versions(
    own: Path, key: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def of_another_machine(record: dict[str, Any]) -> None:
        record["engine"] |= {"runtime": "tensorrt_rtx 1.7", "built_for": ["SM120"], "target": "tensorrt"}

    other = resigned(Path(shutil.copytree(own, tmp_path / "other")), key, of_another_machine)
    with (
        bundles.opened(other) as found,
        pytest.raises(EngineUnavailable, match=r"tensorrt_rtx 1.7 built for SM120 \(here is no"),
    ):
        bundles.answer_golden(found, num_threads=1)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with bundles.opened(own) as found, pytest.raises(EngineUnavailable, match="cannot run here: openvino is not installed"):
        bundles.answer_golden(found, num_threads=1)
    for name in [name for name in sys.modules if name.split(".")[0] == "model_signing"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(StoreError, match="model-signing, which is not installed here .*make setup"), bundles.opened(own):
        pass


def test_what_does_not_answer_as_its_release_does_not_leave(release: Stored[Release], key: Path, tmp_path: Path) -> None:
    made = contents(release)
    assert made.probabilities is not None
    for probabilities in (made.probabilities[::-1].copy(), made.probabilities * np.float32("nan")):
        wrong = Contents(**{**vars(made), "probabilities": probabilities})
        with pytest.raises(EngineUnavailable, match="a probability differs by .*; nothing was written"):
            bundles.write(wrong, tmp_path / "out", key=key, num_threads=1)
    with pytest.raises(ConfigError, match="the task 'ranking' cannot leave in a bundle.*classification"):
        bundles.write(Contents(**{**vars(made), "task": "ranking"}), tmp_path / "out", key=key, num_threads=1)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        bundles.write(made, tmp_path / "there", key=key, num_threads=1)


def colour_engine(folder: Path, precision: Any = "int8") -> Stored[Engine]:
    """A small network on colour pictures, as ONNX Runtime executes it."""
    from onnx import TensorProto, helper, numpy_helper, save

    rng = np.random.default_rng(3)
    stored = {
        "mean": np.array([124, 116, 104], np.float32),
        "std": np.array([58, 57, 57], np.float32),
        "kernel": rng.normal(0, 1, (16, 3, 3, 3)).astype(np.float32),
        "head": rng.normal(0, 1, (3, 16)).astype(np.float32),
        "bias": np.zeros(3, np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["cast", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "std"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "kernel"], ["convolved"]),
        helper.make_node("Relu", ["convolved"], ["active"]),
        helper.make_node("GlobalAveragePool", ["active"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["embedding"]),
        helper.make_node("Gemm", ["embedding", "head", "bias"], ["logits"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", 24, 24, 3])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size])
            for name, size in (("logits", 3), ("embedding", 16))
        ],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    folder.mkdir()
    save(model, folder / "model.onnx")
    record = Engine(
        name=f"onnxruntime-{precision}",
        target="onnxruntime",
        precision=precision,
        settings={},
        checkpoint_digest="c" * 64,
        files=(describe(folder / "model.onnx", within=folder),),
        entry="model.onnx",
        preprocessing=COLOUR,
        classes=("cross", "disc", "stripes"),
        embedding_dim=16,
        temperature=1.0,
        runtime="onnxruntime 1",
        built_for=(),
        facts={},
    )
    return Stored(record, folder)


COLOUR = Preprocessing(
    channels=3,
    height=24,
    width=24,
    resize_shortest=27,
    interpolation="bicubic",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)


def photographs(count: int = 6) -> list[bytes]:
    """JPEGs of smooth colours with edges and some grain, wider than they are high."""
    rng, found = np.random.default_rng(8), []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize(
            (160, 120), Image.Resampling.BICUBIC
        )
        pixels = np.asarray(coarse).astype(int) + rng.integers(-12, 13, (120, 160, 3))
        pixels[30:60, 40:90] = rng.integers(0, 255, 3)
        found.append(encoded(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), "JPEG", quality=90))
    return found


def wrongly(how: str) -> Callable[..., Any]:
    """A preparation of pictures that people write by mistake."""

    def prepared(picture: Any, size: Preprocessing) -> Any:
        image = picture.srgb().convert("RGB")
        if how == "squashed":
            return np.asarray(image.resize((size.width, size.height), Image.Resampling.BICUBIC))
        if how == "every n-th pixel":
            return np.asarray(image.resize((36, 27), Image.Resampling.NEAREST).crop((6, 1, 30, 25)))
        right = prepare(picture, size)
        if how == "bilinear":
            return prepare(picture, size.model_copy(update={"interpolation": "bilinear"}))
        if how == "not cropped":
            return prepare(picture, size.model_copy(update={"resize_shortest": size.height}))
        if how == "blue first":
            return right[..., ::-1]
        # What an engine whose graph scales sees of pictures where its network should have seen them unscaled.
        mean, std = np.array(size.mean) * 255, np.array(size.std)
        return (mean + std * right).round().clip(0, 255).astype(np.uint8)

    return prepared


MISTAKES = ["blue first", "not normalised", "bilinear", "every n-th pixel", "squashed", "not cropped"]


@pytest.fixture(scope="module")
def in_colour(key: Path, release: Stored[Release], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of an int8 engine whose pictures are JPEGs in colour."""
    folder = tmp_path_factory.mktemp("colour")
    made = contents(release, colour_engine(folder / "engine"))
    bundles.write(Contents(**{**vars(made), "pictures": photographs()}), folder / "bundle", key=key, num_threads=1)
    return folder / "bundle"


@pytest.mark.parametrize("how", MISTAKES)
def test_pictures_that_are_prepared_otherwise_are_refused(
    in_colour: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bundles.opened(in_colour) as found:
        # The last one is a copy of another without loss: how a JPEG is decoded differs between machines.
        assert (len(found.record.golden), found.record.golden[-1]) == (7, "006.png")
        assert bundles.answer_golden(found, num_threads=1).problem == ""
        monkeypatch.setattr(bundles, "prepare", wrongly(how))
        answered = bundles.answer_golden(found, num_threads=1)
        assert "prepared otherwise than the engine was built for" in answered.problem
        # Whoever gives the engine such pictures in a program of his own, and compares its logits, sees it as well.
        pictures = [
            wrongly(how)(decode((found.folder / "golden" / name).read_bytes()), COLOUR) for name in found.record.golden
        ]
        engine = Stored(found.record.engine, found.folder / "engine")
        logits, _ = plugins.load("targets", "onnxruntime").load(engine, num_threads=1).predict(np.stack(pictures))
        assert np.abs(logits - np.load(found.folder / "golden" / "logits.npy")).max() > found.record.tolerance


def test_int8_answers_otherwise_where_its_products_are_added_otherwise(
    in_colour: Path, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 % of the range is no other rounding of one machine, and less than what x86 without VNNI makes."""
    own = Path(shutil.copytree(in_colour, tmp_path / "own"))
    logits = np.load(own / "golden" / "logits.npy")
    logits[0, 0] += 0.05 * np.ptp(logits)
    np.save(own / "golden" / "logits.npy", logits)
    with bundles.opened(resigned(own, key)) as found:
        assert "answers its golden vectors wrongly here" in bundles.answer_golden(found, num_threads=1).problem
        assert not predict(found.folder, "--check", status=1)["golden"]["right"]
    elsewhere = resigned(own, key, lambda record: record.update(int8_arithmetic="another processor"))
    with bundles.opened(elsewhere) as found:
        assert bundles.answer_golden(found, num_threads=1).problem == ""
        assert predict(found.folder, "--check")["golden"]["right"]
    # Pictures that say each pixel, and become others.
    pixels = np.asarray(Image.open(own / "golden" / "006.png")).astype(int)
    grain = np.random.default_rng(1).integers(-3, 4, pixels.shape)
    Image.fromarray((pixels // 8 * 8 + grain + 4).clip(0, 255).astype(np.uint8)).save(own / "golden" / "006.png")
    with bundles.opened(resigned(own, key)) as found:
        assert not predict(found.folder, "--check", status=1)["golden"]["right"]
    features = tmp_path / "cpuinfo"
    monkeypatch.setattr(int8_arithmetic, "_CPUINFO", features)
    assert int8_arithmetic.int8_arithmetic() == ""
    for told, has in (
        ("flags\t: fpu avx2 avx512_vnni", "with"),
        ("flags\t: fpu avx2", "without"),
        ("Features: asimddp", "with"),
    ):
        features.write_text(f"model name: any\n{told}\n")
        assert int8_arithmetic.int8_arithmetic().endswith(f" {has} dot products")
