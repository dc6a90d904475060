"""torchvision's ResNets and MobileNetV2 as backbones: feature maps at several strides, the last stage dilated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision import models as tv

from aicsd_deploy.errors import InputError, first_sentence
from aicsd_deploy.files import existing_file


class Backbone(nn.Module):
    """Stages of a classification network, applied one after the other.

    Attributes:
        channels: channels of the feature maps that `forward` returns.
        strides: how many input pixels one position of each map stands for.
    """

    def __init__(self, stages: Sequence[nn.Module], channels: tuple[int, ...], strides: tuple[int, ...]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.channels = channels
        self.strides = strides

    def forward(self, images_BCHW: Tensor) -> list[Tensor]:
        """Return one feature map (B, channels[i], H / strides[i], W / strides[i]) per stage."""
        maps, x = [], images_BCHW
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


def resnet(depth: int, *, weights: Path | None = None) -> Backbone:
    """Return ResNet-18, -50 or -101 at output stride 16 with its four stages (strides 4, 8, 16, 16).

    Args:
        depth: 18, 50 or 101.
        weights: a file with torchvision's state dict of the classification network; None starts from random weights.
    """
    network = {18: tv.resnet18, 50: tv.resnet50, 101: tv.resnet101}[depth](weights=None)
    _load_weights(network, weights)
    stem = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
    _dilate(network.layer4)
    width = 64 if depth == 18 else 256
    return Backbone(
        [nn.Sequential(stem, network.layer1), network.layer2, network.layer3, network.layer4],
        (width, 2 * width, 4 * width, 8 * width),
        (4, 8, 16, 16),
    )


def mobilenet_v2(*, weights: Path | None = None) -> Backbone:
    """Return MobileNetV2 at output stride 16 without its last 1×1 convolution (strides 4, 8, 16, 16).

    Args:
        weights: a file with torchvision's state dict of the classification network; None starts from random weights.
    """
    network = tv.mobilenet_v2(weights=None)
    _load_weights(network, weights)
    blocks = list(network.features)
    last = nn.Sequential(*blocks[14:18])
    _dilate(last)
    stages = [nn.Sequential(*blocks[:4]), nn.Sequential(*blocks[4:7]), nn.Sequential(*blocks[7:14]), last]
    return Backbone(stages, (24, 32, 96, 320), (4, 8, 16, 16))


def _dilate(stage: nn.Module) -> None:
    """Take the stride out of a stage and dilate its 3×3 convolutions by 2 instead, as DeepLab does (arXiv 1606.00915).

    The convolution that strides keeps its dilation of 1: what it reads still has the finer spacing.
    """
    strided = False
    for module in stage.modules():
        if not isinstance(module, nn.Conv2d):
            continue
        if module.stride == (2, 2):
            module.stride = (1, 1)
            strided = strided or module.kernel_size == (3, 3)
        elif module.kernel_size == (3, 3) and strided:
            module.dilation = module.padding = (2, 2)


def _load_weights(network: nn.Module, path: Path | None) -> None:
    if path is None:
        return
    existing_file(path, "The file of --backbone-weights")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            f"{path} is not a weights file that can be loaded safely ({type(error).__name__}: {first_sentence(error)}). "
            "It must be a plain state dict saved by torch.save, or .safetensors."
        ) from error
    own = {k: v.shape for k, v in network.state_dict().items()}
    given = {k: v.shape for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}
    wrong = [k for k, shape in own.items() if not _of_head(k) and given.get(k) != shape]
    more = [
        k for k in given if not _of_head(k) and k not in own
    ]  # those of a deeper ResNet include those of a shallower
    if wrong or more:
        problem = (
            f"{len(wrong)} of {len(own)} tensors are missing or of another shape, {wrong[0]} for one"
            if wrong
            else f"it has {len(more)} tensors that this network has not, {more[0]} for one"
        )
        raise InputError(
            f"{path} does not hold torchvision's {type(network).__name__} weights: {problem}. Give the state dict of "
            "the same backbone."
        )
    network.load_state_dict({k: v for k, v in state.items() if not _of_head(k)}, strict=False)


def _of_head(name: str) -> bool:
    return name.split(".")[0] in ("fc", "classifier")
