"""The training loop: step, validate, save, resume. Knows no teacher and no method: the loss is a callable."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from aicsd_deploy.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from aicsd_deploy.config import TrainConfig
from aicsd_deploy.console import percent, progress, say
from aicsd_deploy.data.dataset import SegmentationDataset
from aicsd_deploy.data.loader import Batch, steps_per_epoch, training_batches
from aicsd_deploy.data.transforms import Augmentation, derived_seed
from aicsd_deploy.distiller import LossBreakdown
from aicsd_deploy.errors import AicsdError, InputError
from aicsd_deploy.evaluate import evaluate
from aicsd_deploy.metadata import Metadata
from aicsd_deploy.models import backbone_parameters
from aicsd_deploy.runtime.torch_backend import TorchBackend
from aicsd_deploy.tracking import RunLog

LAST, BEST = "last.pt", "best.pt"
FREE_TO_CHANGE = {"workers", "threads", "device", "log_every", "save_every", "teacher"}
"""Settings that a resumed run may have different; any other would make it another run."""


class Loss(Protocol):
    """Works out the loss of a batch; see `Distiller`."""

    state: nn.Module
    """What it trains or measures besides the network: optimised and saved with the run, not with the network."""

    def __call__(self, batch: Batch, *, step: int, total_steps: int) -> LossBreakdown: ...


@dataclass
class Trainer:
    """Trains one network and keeps its best and its last state in a run folder.

    Nothing random is carried from step to step: the order, the augmentation and the dropout of a step depend on the seed and
    the step alone. So a run that is killed and resumed computes what an uninterrupted one does.
    """

    network: nn.Module
    loss: Loss
    config: TrainConfig
    metadata: Metadata
    train_data: SegmentationDataset
    val_data: SegmentationDataset
    out: Path
    device: torch.device
    identity: dict[str, Any]
    """What else makes it this run and no other, by name: a run is resumed only where all of it is the same."""

    def fit(self) -> None:
        """Train to the end, from last.pt if there is one.

        Raises:
            InputError: last.pt belongs to a run with other settings.
            AicsdError: the loss is no longer a number.
        """
        config, per_epoch = self.config, steps_per_epoch(self.train_data, self.config.batch_size)
        total = config.epochs * per_epoch
        self.network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = self._optimizer()
        step, best = self._resume(optimizer)
        if step >= total:
            say(f"{self.out}: already trained to the end ({total} steps).")
            return
        self.network.train()
        log = RunLog(self.out, from_step=step)
        batches = training_batches(
            self.train_data,
            Augmentation(
                self.metadata.image_size_hw,
                config.scale,
                config.flip,
                config.color_jitter,
                config.crop_size,
                config.keep_aspect,
            ),
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=step,
            total_steps=total,
            workers=config.workers,
            pin_memory=self.device.type == "cuda",
        )
        try:
            with progress(f"training {self.metadata.model}", total - step) as advance:
                note, logged_at, logged_step = "", time.monotonic(), step
                for batch in batches:
                    logs = step % config.log_every == 0 or step == total - 1
                    values = self._step(optimizer, batch.to(self.device), step=step, total=total, logs=logs)
                    step += 1
                    if logs:
                        now = time.monotonic()
                        speed = (step - logged_step) * config.batch_size / max(now - logged_at, 1e-9)
                        logged_at, logged_step = now, step
                        log.write(step, epoch=step / per_epoch, images_per_s=round(speed, 2), **values)
                    epoch, at_end = divmod(step, per_epoch)
                    if at_end == 0 and (epoch % config.val_every == 0 or step == total):
                        best = self._validate(log, step=step, epoch=epoch, best=best)
                        note = f"epoch {epoch}/{config.epochs}, best val mIoU {percent(best)}"
                        self._save_last(optimizer, step=step, best=best)
                        logged_at = time.monotonic()
                    elif step % config.save_every == 0:
                        self._save_last(optimizer, step=step, best=best)
                    advance(note)
        finally:
            log.close()

    def _step(
        self, optimizer: torch.optim.Optimizer, batch: Batch, *, step: int, total: int, logs: bool
    ) -> dict[str, Any]:
        """Take one optimiser step; return what is to be logged if `logs`."""
        torch.manual_seed(derived_seed("step", self.config.seed, step))
        share = _schedule(step, total, self.config.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * share
        breakdown = self.loss(batch, step=step, total_steps=total)
        norms = breakdown.gradient_norms() if logs else {}
        optimizer.zero_grad(set_to_none=True)
        breakdown.total.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self._trained(), self.config.clip_norm)
        if not math.isfinite(norm.item()):  # before the step, so that no saved state is ever spoilt
            raise AicsdError(
                f"The loss or its gradient is no longer a number at step {step} "
                f"(terms: { {name: term.item() for name, term in breakdown.terms.items()} }). "
                "Use a smaller --lr or --lambda-icsd; last.pt holds a good state."
            )
        optimizer.step()
        if not logs:
            return {}
        terms = {name: term.item() for name, term in breakdown.terms.items()}
        return {
            "loss": breakdown.total.item(),
            "terms": terms,
            "weight": breakdown.weights,
            "gradient_norm": norms,
            "alpha": breakdown.alpha,
            "lr": self.config.lr * share,
        }

    def _validate(self, log: RunLog, *, step: int, epoch: int, best: float | None) -> float:
        backend = TorchBackend(self.network, self.metadata, device=self.device)
        scores = evaluate(backend, self.val_data, title="validating").scores(self.metadata.class_names)
        self.network.train()
        log.write(step, epoch=epoch, val=scores.to_dict())
        if best is not None and scores.miou <= best:
            return best
        metadata = self.metadata.replace(
            scores={"miou": scores.miou, "pixel_accuracy": scores.pixel_accuracy, "epoch": float(epoch)}
        )
        save_checkpoint(self.out / BEST, Checkpoint(metadata, self.network.state_dict()))
        return scores.miou

    def _save_last(self, optimizer: torch.optim.Optimizer, *, step: int, best: float | None) -> None:
        training = {
            "step": step,
            "best": best,
            "optimizer": optimizer.state_dict(),
            "config": self.config.model_dump(mode="json"),
            "identity": self.identity,
            "loss": self.loss.state.state_dict(),
        }
        save_checkpoint(self.out / LAST, Checkpoint(self.metadata, self.network.state_dict(), training))

    def _resume(self, optimizer: torch.optim.Optimizer) -> tuple[int, float | None]:
        for leftover in self.out.glob(".*.tmp*"):  # of a write that was killed
            leftover.unlink()
        if not (self.out / LAST).is_file():
            return 0, None
        checkpoint = load_checkpoint(self.out / LAST)
        if not {"step", "best", "optimizer", "config", "identity"} <= checkpoint.training.keys():
            raise InputError(f"{self.out / LAST} holds no training to go on with. Give another --out.")
        ours = self.config.model_dump(mode="json") | self.identity
        theirs = checkpoint.training["config"] | checkpoint.training["identity"]
        changed = [k for k in ours if k not in FREE_TO_CHANGE and ours[k] != theirs.get(k)]
        if changed:
            lines = "\n".join(f"  {k}: was {theirs.get(k)!r}, now {ours[k]!r}" for k in changed)
            raise InputError(
                f"{self.out / LAST} belongs to a run with other settings:\n{lines}\nGive the same, or another --out."
            )
        self.network.load_state_dict(checkpoint.model)
        self.loss.state.load_state_dict(checkpoint.training.get("loss", {}))
        optimizer.load_state_dict(checkpoint.training["optimizer"])
        step = int(checkpoint.training["step"])
        say(f"{self.out}: going on from step {step}.")
        return step, checkpoint.training["best"]

    def _trained(self) -> list[nn.Parameter]:
        return [*self.network.parameters(), *self.loss.state.parameters()]

    def _optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        factor = config.backbone_lr_factor
        if factor is None:
            factor = 0.1 if config.backbone_weights is not None else 1.0
        backbone = {id(p) for p in backbone_parameters(self.network)}
        groups = []
        for in_backbone in (True, False):
            for decays in (True, False):
                # Biases and batch normalisation are one-dimensional; decaying them only weakens the network.
                chosen = [p for p in self._trained() if (id(p) in backbone) == in_backbone and (p.ndim > 1) == decays]
                lr = config.lr * (factor if in_backbone else 1.0)
                groups.append(
                    {"params": chosen, "lr": lr, "base_lr": lr, "weight_decay": config.weight_decay if decays else 0.0}
                )
        used: Iterable[dict[str, Any]] = [group for group in groups if group["params"]]
        if config.optimizer == "sgd":
            return torch.optim.SGD(used, momentum=0.9)
        return torch.optim.AdamW(used, fused=True)


def _schedule(step: int, total: int, warmup: int) -> float:
    """Return the share of the peak learning rate: a linear rise, times the papers' (1 - progress) ** 0.9."""
    return min(1.0, (step + 1) / max(warmup, 1)) * float((1 - step / total) ** 0.9)
