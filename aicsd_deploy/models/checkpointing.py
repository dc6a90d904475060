"""Activation checkpointing: blocks whose activations are computed again in the backward pass instead of being kept.

Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174; `torch.utils.checkpoint`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from aicsd_deploy.errors import InputError

BLOCKS = {"BasicBlock", "Bottleneck", "InvertedResidual", "DepthwiseSeparableConv", "Block", "ASPP"}
"""Names of the classes that torchvision, timm and segmentation_models_pytorch build backbones from, and our ASPP."""


def checkpoint_activations(network: nn.Module) -> int:
    """Let every block of a network keep its input only; return how many there are.

    Raises:
        InputError: the network has no block of a known kind.
    """
    blocks = [module for module in network.modules() if type(module).__name__ in BLOCKS]
    for block in blocks:
        contexts = partial(_contexts, block)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)
    if not blocks:
        raise InputError(
            f"--checkpoint-activations knows the blocks {', '.join(sorted(BLOCKS))}, and {type(network).__name__} has none. "
            "Leave the flag out, or use torch.utils.checkpoint in your network."
        )
    return len(blocks)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _StatisticsLeftAlone(block)


class _StatisticsLeftAlone(AbstractContextManager[None]):
    """Keeps batch normalisation from counting the same batch twice.

    It is entered once for each backward pass: several go through a block where gradients of single terms are taken at features.
    """

    def __init__(self, block: nn.Module) -> None:
        self._layers = [
            module for module in block.modules() if isinstance(module, _BatchNorm) and module.track_running_stats
        ]

    def __enter__(self) -> None:
        self._before = [(layer.momentum, cast(Tensor, layer.num_batches_tracked).clone()) for layer in self._layers]
        for layer in self._layers:
            layer.momentum = 0.0

    def __exit__(self, *_: object) -> None:
        for layer, (momentum, batches) in zip(self._layers, self._before, strict=True):
            layer.momentum = momentum
            cast(Tensor, layer.num_batches_tracked).copy_(batches)
