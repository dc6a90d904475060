"""Teacher and student together: from a batch to a loss, term by term. Knows no optimiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aicsd_deploy.config import Method
from aicsd_deploy.data.loader import Batch
from aicsd_deploy.losses.icsd import icsd_loss
from aicsd_deploy.losses.pixel_kd import pixel_kd_loss
from aicsd_deploy.losses.schedule import alw_alpha
from aicsd_deploy.metadata import IGNORE_LABEL
from aicsd_deploy.training.distributed import sum_over_processes, world_size
from aicsd_deploy.training.timing import Phase, untimed

MEANS_OVER_PIXELS = ("kd",)
"""Terms that are means over labelled pixels of the logits; the others are means over images. See `fair_share`."""


@dataclass(frozen=True)
class LossBreakdown:
    """What one step's loss is made of.

    Attributes:
        total: the weighted sum, a scalar with its gradient.
        terms: each term by name, before weighting.
        weights: what each term is multiplied with in `total`.
        logits_BCHW: the student's logits, from which gradients of single terms can be taken.
        alpha: α of ALW; None where the method has none.
    """

    total: Tensor
    terms: dict[str, Tensor]
    weights: dict[str, float]
    logits_BCHW: Tensor
    alpha: float | None = None

    def gradient_norms(self) -> dict[str, float]:
        """Return the norm of each weighted term's gradient with respect to the student's logits."""
        norms = {}
        for name, term in self.terms.items():
            (gradient,) = torch.autograd.grad(term * self.weights[name], self.logits_BCHW, retain_graph=True)
            norms[name] = gradient.float().norm().item()
        return norms


def cross_entropy(logits_BCHW: Tensor, labels_BHW: Tensor) -> Tensor:
    """Return the mean cross-entropy over the labelled pixels, at the size of the labels; 0 where none is labelled."""
    full_BCHW = F.interpolate(logits_BCHW.float(), size=labels_BHW.shape[1:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(full_BCHW, labels_BHW, ignore_index=IGNORE_LABEL, reduction="sum")
    return total / (labels_BHW != IGNORE_LABEL).sum().clamp(min=1)


@dataclass
class Distiller:
    """Works out the loss of a student, with or without a teacher.

    Attributes:
        student: the network in training, with its normalisation: uint8 images (B, 3, H, W) to logits.
        teacher: the network to learn from, likewise; kept in eval mode and without gradients. None for method "none".
        method: which terms there are; "aicsd" is equation 6 of arXiv 2308.04243.
        lambda_icsd, lambda_kd, temperature, icsd_normalize: see `DistillConfig`.
        autocast: what the networks compute in; None is float32. The losses are always given float32.
        phase: times the parts of the work.
    """

    student: nn.Module
    teacher: nn.Module | None = None
    method: Method = "none"
    lambda_icsd: float = 100.0
    lambda_kd: float = 1.0
    temperature: float = 1.0
    icsd_normalize: Literal["row", "none"] = "row"
    autocast: torch.dtype | None = None
    phase: Phase = untimed

    def __post_init__(self) -> None:
        if (self.teacher is None) != (self.method == "none"):
            raise ValueError(f"method {self.method!r} {'needs a' if self.teacher is None else 'takes no'} teacher")
        if self.teacher is not None:
            self.teacher.requires_grad_(False)

    def __call__(self, batch: Batch, *, step: int, total_steps: int) -> LossBreakdown:
        """Return the loss of one batch.

        Args:
            batch: on the networks' device.
            step: optimiser steps done so far.
            total_steps: how many the whole training takes; with `step` it gives α.
        """
        images = batch.images_BCHW.contiguous(memory_format=torch.channels_last)  # the faster layout for convolutions
        with self.phase("teacher"):  # first, so that its activations are gone before the student's are kept
            target = None if self.teacher is None else self._teacher_logits(images)
        with self.phase("student"), self._autocast(images):
            logits = self.student(images)
        with self.phase("losses"):
            return self._losses(logits.float(), target, batch, step=step, total_steps=total_steps)

    def _losses(
        self, logits: Tensor, target: Tensor | None, batch: Batch, *, step: int, total_steps: int
    ) -> LossBreakdown:
        terms = {"ce": cross_entropy(logits, batch.labels_BHW) * fair_share(batch, batch.labels_BHW.shape[1:])}
        if target is None:
            return LossBreakdown(terms["ce"], terms, {"ce": 1.0}, logits)
        if target.shape != logits.shape:
            target = F.interpolate(target, size=logits.shape[2:], mode="bilinear", align_corners=False)
        valid = valid_at(batch.labels_BHW, logits.shape[2:])
        if self.method in ("kd", "aicsd"):
            terms["kd"] = pixel_kd_loss(logits, target, temperature=self.temperature, valid=valid)
        if self.method in ("icsd", "aicsd"):
            terms["icsd"] = icsd_loss(
                logits, target, temperature=self.temperature, valid=valid, normalize=self.icsd_normalize
            )
        for name in terms.keys() & MEANS_OVER_PIXELS:
            terms[name] = terms[name] * fair_share(batch, logits.shape[2:])
        weights, alpha = {"ce": 1.0, "kd": self.lambda_kd, "icsd": self.lambda_icsd}, None
        if self.method == "aicsd":
            alpha = alw_alpha(step, total_steps)
            weights = {"ce": alpha, "icsd": alpha * self.lambda_icsd, "kd": (1 - alpha) * self.lambda_kd}
        total = torch.stack([terms[name].float() * weights[name] for name in terms]).sum()
        return LossBreakdown(total, terms, {name: weights[name] for name in terms}, logits, alpha)

    def _teacher_logits(self, images_BCHW: Tensor) -> Tensor:
        assert self.teacher is not None
        self.teacher.eval()  # dropout and batch statistics too: somebody may have called train() on it
        with torch.inference_mode(), self._autocast(images_BCHW):
            logits: Tensor = self.teacher(images_BCHW)
        return logits.to(
            torch.float32, copy=True
        )  # a copy is an ordinary tensor, which a loss may save for its backward

    def _autocast(self, images: Tensor) -> torch.autocast:
        return torch.autocast(images.device.type, dtype=self.autocast, enabled=self.autocast is not None)


def fair_share(batch: Batch, size_hw: tuple[int, ...]) -> Tensor | float:
    """Return what to multiply a mean over this batch's labelled pixels with, so that all parts of a step average to its mean.

    A step may be cut into parts, one after the other and over processes, that have different numbers of labelled pixels.

    Args:
        batch: a part, or all of what this process sees in the step.
        size_hw: the size at which the pixels are counted, as by `valid_at`.
    """
    processes = world_size()
    if batch.step_labels_BHW is None and processes == 1:
        return 1.0
    step_labels = batch.labels_BHW if batch.step_labels_BHW is None else batch.step_labels_BHW
    here = valid_at(batch.labels_BHW, size_hw).sum()
    everywhere = sum_over_processes(valid_at(step_labels, size_hw).sum())
    parts = processes * step_labels.shape[0] / batch.labels_BHW.shape[0]
    return here * parts / everywhere.clamp(min=1)


def valid_at(labels_BHW: Tensor, size_hw: tuple[int, ...]) -> Tensor:
    """Return which positions of a map of `size_hw` are labelled, bool (B, h, w), by the nearest pixel."""
    labelled = (labels_BHW != IGNORE_LABEL).unsqueeze(1).float()
    return F.interpolate(labelled, size=size_hw, mode="nearest-exact").squeeze(1) > 0.5
