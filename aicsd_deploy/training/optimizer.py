"""The optimiser, its learning rate at every step, and the running mean of the weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from aicsd_deploy.config import TrainConfig
from aicsd_deploy.models import backbone_parameters


def build_optimizer(network: nn.Module, config: TrainConfig, *, besides: nn.Module) -> torch.optim.Optimizer:
    """Return a fused optimiser, which `StepGuard` needs; groups carry their peak learning rate as `base_lr`.

    Args:
        network: what is trained.
        config: optimiser, learning rates, weight decay.
        besides: what is trained along with it and has no backbone: the adapters of a loss.
    """
    factor = config.backbone_lr_factor
    if factor is None:
        factor = 0.1 if config.backbone_weights is not None else 1.0
    backbone = {id(p) for p in backbone_parameters(network)}
    trained = [*network.parameters(), *besides.parameters()]
    groups = []
    for in_backbone in (True, False):
        for decays in (True, False):
            # Biases and batch normalisation are one-dimensional; decaying them only weakens the network.
            chosen = [p for p in trained if (id(p) in backbone) == in_backbone and (p.ndim > 1) == decays]
            lr = config.lr * (factor if in_backbone else 1.0)
            groups.append(
                {"params": chosen, "lr": lr, "base_lr": lr, "weight_decay": config.weight_decay if decays else 0.0}
            )
    used: Iterable[dict[str, Any]] = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        sgd = torch.optim.SGD(used, momentum=0.9, fused=True)
        for parameter in trained:
            # Left to the first step, which may be a broken one, the kernel would take whatever the memory holds.
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    return torch.optim.AdamW(used, fused=True)


def lr_share(step: int, total: int, warmup: int) -> float:
    """Return the share of the peak learning rate: a linear rise, times the papers' (1 - progress) ** 0.9.

    The rise takes `warmup` steps, or a fifth of `total` where that is less, so that a short training has time to learn.
    """
    rise = max(min(warmup, total // 5), 1)
    return min(1.0, (step + 1) / rise) * float((1 - step / total) ** 0.9)


class RunningMean:
    """A copy of a network whose weights follow it as an exponential moving average, and its statistics as they are.

    The decay begins small (after TensorFlow's ExponentialMovingAverage), or a mean over 1000 steps would still be full of the
    random weights of the first after as many. PyTorch's AveragedModel would make a GPU wait at every step for the number of updates.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Move the mean towards what the network is after a step, of which `step` were done before."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.network.parameters()), list(network.parameters()), 1 - decay)
        for mean, now in zip(self.network.buffers(), network.buffers(), strict=True):
            mean.copy_(now)
