"""DeepLabV3+ checkpoints in the format that the paper's teachers were released in, read into our own network.

The format is that of github.com/jfzhang95/pytorch-deeplab-xception: a dictionary with `state_dict`, whose names begin with
`backbone.`, `aspp.` and `decoder.`. Its network differs from ours in two ways, which are set here: the three blocks of the
last stage are dilated by 2, 4 and 8 (a multi-grid), and features and logits are upsampled with aligned corners.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from aicsd_deploy.errors import InputError
from aicsd_deploy.models.backbones import resnet
from aicsd_deploy.models.deeplab import DeepLabV3Plus

MARK = "aspp.aspp1.atrous_conv.weight"
MULTI_GRID = (2, 4, 8)
_NAMES = [  # ours, theirs
    (r"^backbone\.stages\.0\.0\.0\.", "backbone.conv1."),
    (r"^backbone\.stages\.0\.0\.1\.", "backbone.bn1."),
    (r"^backbone\.stages\.0\.1\.", "backbone.layer1."),
    (r"^backbone\.stages\.1\.", "backbone.layer2."),
    (r"^backbone\.stages\.2\.", "backbone.layer3."),
    (r"^backbone\.stages\.3\.", "backbone.layer4."),
    (r"^aspp\.branches\.0\.", "aspp.aspp1."),
    (r"^aspp\.branches\.1\.", "aspp.aspp2."),
    (r"^aspp\.branches\.2\.", "aspp.aspp3."),
    (r"^aspp\.branches\.3\.", "aspp.aspp4."),
    (r"(aspp\.aspp\d)\.0\.", r"\1.atrous_conv."),
    (r"(aspp\.aspp\d)\.1\.", r"\1.bn."),
    (r"^aspp\.pool\.1\.0\.", "aspp.global_avg_pool.1."),
    (r"^aspp\.pool\.1\.1\.", "aspp.global_avg_pool.2."),
    (r"^aspp\.project\.0\.0\.", "aspp.conv1."),
    (r"^aspp\.project\.0\.1\.", "aspp.bn1."),
    (r"^low_level\.0\.", "decoder.conv1."),
    (r"^low_level\.1\.", "decoder.bn1."),
    (r"^decoder\.0\.0\.", "decoder.last_conv.0."),
    (r"^decoder\.0\.1\.", "decoder.last_conv.1."),
    (r"^decoder\.1\.0\.", "decoder.last_conv.4."),
    (r"^decoder\.1\.1\.", "decoder.last_conv.5."),
    (r"^classifier\.", "decoder.last_conv.8."),
]


def state_of_published(content: Any) -> dict[str, Tensor] | None:
    """Return the state dict of a loaded file in this format, its names without `module.`; None for any other file."""
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        return None
    plain = {str(name).removeprefix("module."): value for name, value in state.items()}
    return plain if MARK in plain else None


def build_published(state: Mapping[str, Tensor], *, origin: str) -> nn.Module:
    """Return the network with the weights of `state` (see `state_of_published`), in eval mode.

    Raises:
        InputError: its backbone is not ResNet-50 or -101, or tensors are missing or of another shape.
    """
    blocks = {int(m[1]) for name in state if (m := re.match(r"backbone\.layer3\.(\d+)\.conv3\.weight", name))}
    depth = {6: 50, 23: 101}.get(len(blocks))
    classifier = state.get("decoder.last_conv.8.weight")
    if depth is None or classifier is None:
        raise InputError(
            f"{origin} is a DeepLabV3+ checkpoint, but its backbone is not ResNet-50 or ResNet-101 ({len(blocks)} bottleneck "
            "blocks in layer3), and only those can be read. Wrap it in your own function: --teacher package.module:function."
        )
    network = DeepLabV3Plus(resnet(depth), classifier.shape[0], align_corners=True)
    for block, dilation in zip(network.backbone.stages[3].children(), MULTI_GRID, strict=True):
        convolution = block.get_submodule("conv2")
        assert isinstance(convolution, nn.Conv2d)
        convolution.dilation = convolution.padding = (dilation, dilation)
    mapped, missing = {}, []
    for name, ours in network.state_dict().items():
        theirs = _their_name(name)
        value = state.get(theirs)
        if value is not None and value.shape == ours.shape:
            mapped[name] = value
        elif not name.endswith("num_batches_tracked"):  # old files have none, and nothing needs it
            missing.append(theirs)
    if missing:
        raise InputError(
            f"{origin}: {len(missing)} tensors are missing or of another shape, {missing[0]} for one. Copy the file anew, or wrap the "
            "network in your own function: --teacher package.module:function."
        )
    network.load_state_dict(mapped, strict=False)
    return network.eval()


def _their_name(name: str) -> str:
    for ours, theirs in _NAMES:
        name = re.sub(ours, theirs, name)
    return name
