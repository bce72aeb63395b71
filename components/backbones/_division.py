"""Networks of torchvision and timm, without their classifier, as blocks whose composition is the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from components.backbones._parts import parts


class _Call(nn.Module):
    """A piece of a network's own forward that is no module of it, with the modules and parameters that it uses."""

    def __init__(self, call: Callable[[Any, torch.Tensor], torch.Tensor], **used: nn.Module | nn.Parameter | None) -> None:
        super().__init__()
        self._call = call
        for name, part in used.items():
            setattr(self, name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._call(self, x)


def divided(module: nn.Module) -> list[nn.Module]:
    """Blocks of a network, first to last, stem in the first and pooling in the last; [] where its kind is not known."""
    kind = f"{type(module).__module__.split('.')[0]}.{type(module).__name__}"
    found = _KINDS.get(kind)
    return found(module) if found is not None else []


def _joined(first: Sequence[nn.Module], inner: Sequence[nn.Module], last: Sequence[nn.Module]) -> list[nn.Module]:
    """The blocks `inner` with what stands before the first and after the last of them."""
    blocks = list(inner)
    blocks[0] = nn.Sequential(*first, blocks[0])
    blocks[-1] = nn.Sequential(blocks[-1], *last)
    return blocks


def _resnet(module: Any) -> list[nn.Module]:
    timm = hasattr(module, "global_pool")
    stem = [module.conv1, module.bn1, module.act1 if timm else module.relu, module.maxpool]
    inner = [module.layer1, module.layer2, module.layer3, module.layer4]
    return _joined(stem, inner, [module.global_pool] if timm else [module.avgpool, nn.Flatten(1)])


def _features(module: Any) -> list[nn.Module]:
    """`features`, pooling and what is left of the classifier."""
    return _joined([], parts(module, "features"), [module.avgpool, nn.Flatten(1), module.classifier])


def _convnext(module: Any) -> list[nn.Module]:
    return _joined([], parts(module, "features"), [module.avgpool, module.classifier])


def _by_pooling(module: Any) -> list[nn.Module]:
    """AlexNet and VGG: a block ends with its pooling, the hidden layers of the classifier are the last one."""
    blocks: list[list[nn.Module]] = [[]]
    for layer in module.features:
        blocks[-1].append(layer)
        if isinstance(layer, nn.MaxPool2d):
            blocks.append([])
    rest = [*blocks.pop(), module.avgpool, nn.Flatten(1), module.classifier]
    return [*(nn.Sequential(*block) for block in blocks), nn.Sequential(*rest)]


def _densenet(module: Any) -> list[nn.Module]:
    tail = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(1)]
    named = dict(module.features.named_children())
    stem = [named[name] for name in ("conv0", "norm0", "relu0", "pool0")]
    inner = [nn.Sequential(named[f"denseblock{i}"], named[f"transition{i}"]) for i in (1, 2, 3)]
    return _joined(stem, [*inner, named["denseblock4"]], [named["norm5"], *tail])


def _swin(module: Any) -> list[nn.Module]:
    """Each stage with the merging of patches before it."""
    features = parts(module, "features")
    stages = [nn.Sequential(*features[place : place + 2]) for place in range(0, len(features), 2)]
    return _joined([], stages, [module.norm, module.permute, module.avgpool, module.flatten])


def _vit(module: Any) -> list[nn.Module]:
    width, patch = module.hidden_dim, module.conv_proj

    def stem(own: Any, x: torch.Tensor) -> torch.Tensor:
        tokens = own.patch(x).reshape(len(x), width, -1).permute(0, 2, 1)
        found: torch.Tensor = torch.cat([own.token.expand(len(x), -1, -1), tokens], dim=1) + own.position
        return found

    first = _Call(stem, patch=patch, token=module.class_token, position=module.encoder.pos_embedding)
    last = _Call(lambda _, x: x[:, 0])
    inner = list(module.encoder.layers)
    return _joined([first, module.encoder.dropout], inner, [module.encoder.ln, last, module.heads])


def _timm_efficientnet(module: Any) -> list[nn.Module]:
    stem = parts(module, "conv_stem", "bn1", whole=True)
    return _joined(stem, parts(module, "blocks"), parts(module, "conv_head", "bn2", "global_pool", whole=True))


def _timm_mobilenetv3(module: Any) -> list[nn.Module]:
    stem = parts(module, "conv_stem", "bn1", whole=True)
    tail = parts(module, "global_pool", "conv_head", "norm_head", "act2", "flatten", whole=True)
    return _joined(stem, parts(module, "blocks"), tail)


def _timm_convnext(module: Any) -> list[nn.Module]:
    return _joined([module.stem], parts(module, "stages"), [module.norm_pre, module.head])


def _timm_regnet(module: Any) -> list[nn.Module]:
    return _joined([module.stem], [module.s1, module.s2, module.s3, module.s4], [module.final_conv, module.head])


def _timm_vit(module: Any) -> list[nn.Module]:
    def stem(own: Any, x: torch.Tensor) -> torch.Tensor:
        whole = own.whole[0]
        found: torch.Tensor = whole.norm_pre(whole.patch_drop(whole._pos_embed(whole.patch_embed(x))))
        return found

    def pooled(own: Any, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = own.whole[0].forward_head(own.norm(x))
        return found

    tokens = {"token": module.cls_token, "registers": module.reg_token}
    first = _Call(stem, patch=module.patch_embed, **tokens, position=module.pos_embed, norm=module.norm_pre)
    last = _Call(pooled, norm=module.norm, attention=module.attn_pool, pool_norm=module.fc_norm)
    for call in (first, last):
        # In a tuple, so that the whole network is no part of a block.
        object.__setattr__(call, "whole", (module,))
    return _joined([first], parts(module, "blocks"), [last])


def _timm_swin(module: Any) -> list[nn.Module]:
    return _joined([module.patch_embed], parts(module, "layers"), [module.norm, module.head])


_KINDS: dict[str, Callable[[nn.Module], list[nn.Module]]] = {
    "torchvision.AlexNet": _by_pooling,
    "torchvision.VGG": _by_pooling,
    "torchvision.ResNet": _resnet,
    "torchvision.EfficientNet": _features,
    "torchvision.MobileNetV3": _features,
    "torchvision.ConvNeXt": _convnext,
    "torchvision.DenseNet": _densenet,
    "torchvision.VisionTransformer": _vit,
    "torchvision.SwinTransformer": _swin,
    "timm.ResNet": _resnet,
    "timm.EfficientNet": _timm_efficientnet,
    "timm.MobileNetV3": _timm_mobilenetv3,
    "timm.ConvNeXt": _timm_convnext,
    "timm.RegNet": _timm_regnet,
    "timm.VisionTransformer": _timm_vit,
    "timm.SwinTransformer": _timm_swin,
}
