"""One optimiser step, whatever the precision, the number of processes and the number of parts."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from aicsd_deploy.config import TrainConfig
from aicsd_deploy.data.loader import Batch
from aicsd_deploy.data.transforms import derived_seed
from aicsd_deploy.distiller import LossBreakdown
from aicsd_deploy.training import distributed
from aicsd_deploy.training.guard import StepGuard
from aicsd_deploy.training.optimizer import RunningMean, build_optimizer, lr_share
from aicsd_deploy.training.timing import Phase, StepClock


class Loss(Protocol):
    """Works out the loss of a batch; see `Distiller`.

    Attributes:
        student: what is in training; several processes share the gradients of what stands here.
        state: what it trains or measures besides the network: optimised and saved with the run, not with the network.
        phase: times the parts of the work.
        picture_scale: how many times as high and wide as their labels the pictures are that it takes.
    """

    student: nn.Module
    state: nn.Module
    phase: Phase
    picture_scale: float

    def __call__(self, batch: Batch, *, step: int, total_steps: int) -> LossBreakdown: ...


class TrainStep:
    """Takes optimiser steps and owns all that changes with them but the network: what a checkpoint needs besides it."""

    def __init__(
        self,
        network: nn.Module,
        loss: Loss,
        config: TrainConfig,
        device: torch.device,
        *,
        autocast: torch.dtype | None,
    ) -> None:
        """Take a network that is on its device, and the loss that has it inside `loss.student`."""
        self.network, self.loss, self.config = network, loss, config
        self.clock = StepClock(device)
        loss.phase = self.clock.phase
        self.optimizer = build_optimizer(network, config, besides=loss.state)
        self.guard = StepGuard(network, device)
        self.mean = None if config.ema is None else RunningMean(network, config.ema)
        self.scaler = torch.amp.GradScaler(device.type, enabled=autocast is torch.float16)
        self._stop_asked = torch.zeros((), device=device)

    def __call__(self, batch: Batch, *, step: int, total: int, logs: bool, stop: bool = False) -> dict[str, Any]:
        """Take one step; return what is to be logged if `logs`, and else nothing.

        Args:
            batch: this process's share, on the device.
            step: optimiser steps done before.
            total: how many the training takes.
            logs: whether to work out what a line of the log holds, for which a GPU is waited for.
            stop: whether this process was asked to stop; `stop_asked` then says so in all processes.
        """
        config, phase = self.config, self.clock.phase
        rank = distributed.rank()
        torch.manual_seed(derived_seed("step", config.seed, step, *([rank] if rank else [])))
        share = lr_share(step, total, config.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * share
        self.guard.before()
        self.optimizer.zero_grad(set_to_none=True)
        parts = batch.split(config.accumulate)
        rows, norms = [], []
        for number, part in enumerate(parts, start=1):
            held = distributed.gradients_held_back(self.loss.student) if number < len(parts) else nullcontext()
            with held:
                breakdown = self.loss(part, step=step, total_steps=total)
                if logs:
                    norms.append(breakdown.gradient_norms())
                with phase("backward"):
                    self.scaler.scale(breakdown.total / len(parts)).backward()  # type: ignore[no-untyped-call]
            rows.append(
                torch.stack([breakdown.total.detach(), *(t.detach().float() for t in breakdown.terms.values())])
            )
        with phase("optimizer"):
            # Those of the student are averaged as they come. All before unscaling, where each process looks for an overflow.
            distributed.average_gradients(self.loss.state)
            self.scaler.unscale_(self.optimizer)
            trained = [*self.network.parameters(), *self.loss.state.parameters()]
            gradient = nn.utils.clip_grad_norm_(trained, config.clip_norm)
            row = self._over_processes(torch.stack(rows).mean(dim=0), stop=stop)
            values = dict(zip(["loss", "gradient", *breakdown.terms], [row[0], gradient, *row[1:]], strict=True))
            skip = self.guard.judge(step, values, scaled=self.scaler.is_enabled())
            self.optimizer.found_inf, self.optimizer.grad_scale = skip, None  # type: ignore[attr-defined]
            self.optimizer.step()
            self.scaler.update()
            if self.mean is not None:
                self.mean.update(self.network, step)
        if not logs:
            return {}
        return {
            "loss": row[0].item(),
            "terms": dict(zip(breakdown.terms, row[1:].tolist(), strict=True)),
            "weight": breakdown.weights,
            "gradient_norm": _joint_norms(norms),
            "alpha": breakdown.alpha,
            "lr": config.lr * share,
        }

    @property
    def validated_network(self) -> nn.Module:
        """What is scored and kept as best.pt: the running mean of the weights where there is one."""
        return self.network if self.mean is None else self.mean.network

    def stop_asked(self) -> bool:
        """Return whether any process was asked to stop up to the last step; on a GPU this waits for it."""
        return bool(self._stop_asked.item())

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "guard": self.guard.state_dict(),
            "loss": self.loss.state.state_dict(),
            "ema": None if self.mean is None else self.mean.network.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.guard.load_state_dict(state["guard"])
        self.loss.state.load_state_dict(state["loss"])
        if self.scaler.is_enabled() and state["scaler"]:  # empty where the run began on a device that needs no scaling
            self.scaler.load_state_dict(state["scaler"])
        if self.mean is not None:
            self.mean.network.load_state_dict(state["ema"])
            # Ranges of imitated INT8 stand in no state dict; the copy is told those that the network has got back.
            ours = dict(self.mean.network.named_buffers())
            for name, values in self.network.named_buffers():
                if name not in state["ema"]:
                    ours[name].copy_(values)

    def _over_processes(self, row: Tensor, *, stop: bool) -> Tensor:
        """Return the mean over all processes of loss and terms, and pass the wish to stop on in the same sum."""
        processes = distributed.world_size()
        if processes == 1:
            return row
        summed = distributed.sum_over_processes(torch.cat([row / processes, torch.full_like(row[:1], float(stop))]))
        self._stop_asked = summed[-1]
        return summed[:-1]


def _joint_norms(parts: list[dict[str, float]]) -> dict[str, float]:
    """Return the norms of the whole step's gradients from those of its parts, which count by their share."""
    squares = torch.tensor([[value**2 for value in part.values()] for part in parts], dtype=torch.float64).sum(dim=0)
    pieces = len(parts) * distributed.world_size()
    norms = distributed.sum_over_processes(squares).sqrt() / pieces
    return dict(zip(parts[0], norms.tolist(), strict=True))
