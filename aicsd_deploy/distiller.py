"""Teacher and student together: from a batch to a loss, term by term. Knows no optimiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aicsd_deploy.config import MethodConfig
from aicsd_deploy.data.loader import Batch
from aicsd_deploy.features import FeatureTap
from aicsd_deploy.losses.attention import attention_loss
from aicsd_deploy.losses.cwd import cwd_loss
from aicsd_deploy.losses.dist import dist_loss
from aicsd_deploy.losses.ickd import ickd_loss
from aicsd_deploy.losses.icsd import icsd_loss
from aicsd_deploy.losses.pixel_kd import pixel_kd_loss
from aicsd_deploy.losses.schedule import alw_alpha, warmup_share
from aicsd_deploy.losses.similarity import similarity_loss
from aicsd_deploy.metadata import IGNORE_LABEL
from aicsd_deploy.training.distributed import sum_over_processes, world_size
from aicsd_deploy.training.timing import Phase, untimed

TERMS = {"none": (), "aicsd": ("kd", "icsd")}
"""The teacher's terms of a method; every other method has the one of its own name."""
LOGIT_LOSSES: dict[str, Callable[..., Tensor]] = {
    "kd": pixel_kd_loss,
    "icsd": icsd_loss,
    "cwd": cwd_loss,
    "dist": dist_loss,
}
FEATURE_LOSSES = {"at": attention_loss, "sp": similarity_loss, "ickd": ickd_loss}
OWN_LAMBDA = {"cwd": 3.0, "dist": 1.0, "at": 1.5, "sp": 15.0, "ickd": 1.0}
"""cwd and dist: their papers'. The others: such that on CamVid their gradient at the features is about half of cross-entropy's."""
OWN_TEMPERATURE = {"cwd": 4.0}
BALANCE_STEPS = 20
"""Over so many first steps `balance` averages the gradients' squared norms; the weights stay as they are after."""
GRADIENT_SCALE = 2.0**14
"""Keeps the gradients of single pixels above what float16 can show while their norm is taken."""


@dataclass(frozen=True)
class LossBreakdown:
    """What one step's loss is made of.

    Attributes:
        total: the weighted sum, a scalar with its gradient.
        terms: each term by name, before weighting.
        weights: what each term is multiplied with in `total`.
        anchor: where gradients of single terms are compared: the student's features for a method that works on those, else
            its logits.
        alpha: α of ALW; None where the method has none.
    """

    total: Tensor
    terms: dict[str, Tensor]
    weights: dict[str, float]
    anchor: Tensor
    alpha: float | None = None

    def gradient_norms(self) -> dict[str, float]:
        """Return the norm of each weighted term's gradient at the `anchor`."""
        return {n: abs(self.weights[n]) * _gradient_norm(term, self.anchor).item() for n, term in self.terms.items()}


class Distiller:
    """Works out the loss of a student, with or without a teacher.

    Attributes:
        student: the network in training, with its normalisation: uint8 images (B, 3, H, W) to logits.
        teacher: the network to learn from, likewise; kept in eval mode and without gradients. None for method "none".
        settings: the method and its options; "aicsd" is equation 6 of arXiv 2308.04243.
        state: what is trained or measured on the way and belongs to the run, not to the student: adapters of features as
            parameters, and what `balance` has measured as buffers.
        autocast: what the networks compute in; None is float32. The losses are always given float32.
        phase: times the parts of the work.
        picture_scale: pictures may be this many times as large as their labels: the teacher sees them so, the student smaller.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        settings: MethodConfig | None = None,
        *,
        epochs: int = 1,
        image_size_hw: tuple[int, int] = (64, 64),
        known_classes: Sequence[int] | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        """Tie teacher and student together.

        Args:
            student, teacher: see above.
            settings: None is plain training on labels.
            epochs: how many epochs the training takes; for α per epoch.
            image_size_hw: a size that both networks take; for features, which are looked at once.
            known_classes: the classes that the teacher knows, where it knows only some; None: all.
            autocast: see above.
        """
        self.student, self.teacher = student, teacher
        self.autocast = autocast
        self.phase: Phase = untimed
        self.settings = MethodConfig(method="none") if settings is None else settings
        self.picture_scale = self.settings.teacher_scale
        self.names = TERMS.get(self.settings.method, (self.settings.method,))
        self._epochs = epochs
        self._known = None if known_classes is None else torch.tensor(list(known_classes))
        self._balanced: dict[str, float] | None = None
        self.state = nn.Module()
        method = self.settings.method
        if (teacher is None) != (method == "none"):
            raise ValueError(f"method {method!r} {'needs a' if teacher is None else 'takes no'} teacher")
        if teacher is None:
            return
        teacher.requires_grad_(False)
        device = next(student.parameters()).device
        if self.settings.balance is not None:
            for name in ("ce", *self.names):
                self.state.register_buffer(f"squares_{name}", torch.zeros((), device=device))
        if method in FEATURE_LOSSES:
            self._student_tap = FeatureTap(student, self.settings.student_layer, who="student")
            self._teacher_tap = FeatureTap(teacher, self.settings.teacher_layer, who="teacher")
            # For every such method: a layer without a feature map is refused here, before anything is written.
            with self._autocast(device):  # the teacher's weights may be in half precision already
                channels = [tap.channels(image_size_hw, device) for tap in (self._student_tap, self._teacher_tap)]
            if method == "ickd":
                self.state.adapter = nn.Conv2d(channels[0], channels[1], 1, bias=False).to(device)

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
        with self.phase("student"), self._autocast(images.device):
            logits = self.student(_averaged(images, batch.labels_BHW.shape[1:]))
        with self.phase("losses"):
            return self._losses(logits.float(), target, batch, step=step, total_steps=total_steps)

    def _losses(
        self, logits: Tensor, target: Tensor | None, batch: Batch, *, step: int, total_steps: int
    ) -> LossBreakdown:
        terms = {"ce": cross_entropy(logits, batch.labels_BHW) * fair_share(batch, batch.labels_BHW.shape[1:])}
        if target is None:
            return LossBreakdown(terms["ce"], terms, {"ce": 1.0}, logits)
        anchor = logits
        if self.settings.method in FEATURE_LOSSES:
            anchor = self._student_tap.take()
            terms |= self._feature_term(anchor)
        else:
            terms |= self._logit_terms(logits, target, batch)
        lambdas = self._lambdas(terms, anchor, step)
        weights, alpha = self._weights(lambdas, step, total_steps)
        total = torch.stack([terms[name].float() * weights[name] for name in terms]).sum()
        return LossBreakdown(total, terms, weights, anchor, alpha)

    def _teacher_logits(self, images_BCHW: Tensor) -> Tensor:
        assert self.teacher is not None
        self.teacher.eval()  # dropout and batch statistics too: somebody may have called train() on it
        with torch.inference_mode(), self._autocast(images_BCHW.device):
            logits: Tensor = self.teacher(images_BCHW)
        return _ordinary(logits)

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def _feature_term(self, features_BCHW: Tensor) -> dict[str, Tensor]:
        name, target = self.settings.method, _ordinary(self._teacher_tap.take())
        features_BCHW = features_BCHW.float()
        if name == "ickd":
            features_BCHW = self.state.get_submodule("adapter")(features_BCHW)
        return {name: FEATURE_LOSSES[name](features_BCHW, target)}

    def _logit_terms(self, student: Tensor, teacher: Tensor, batch: Batch) -> dict[str, Tensor]:
        settings, labels_BHW = self.settings, batch.labels_BHW
        size = labels_BHW.shape[1:] if settings.distill_size == "full" else student.shape[2:]
        student, teacher = _resized(student, size), _resized(teacher, size)
        labels = labels_at(labels_BHW, size)
        counted = labels != IGNORE_LABEL if settings.mask_ignored else torch.ones_like(labels, dtype=torch.bool)
        valid = counted
        if settings.teacher_errors == "mask":
            valid = valid & ((teacher.argmax(dim=1) == labels) | (labels == IGNORE_LABEL))
        if settings.teacher_confidence > 0:
            valid = valid & (torch.softmax(teacher.float(), dim=1).amax(dim=1) >= settings.teacher_confidence)
        weight = probability_of_labels(teacher, labels) if settings.teacher_errors == "weigh" else 1.0
        present = classes_present(teacher, labels) if settings.icsd_classes == "present" else None
        if self._known is not None:
            known = self._known = self._known.to(labels.device)
            valid = valid & (torch.isin(labels, known) | (labels == IGNORE_LABEL))
            student, teacher = student[:, known], teacher[:, known]
            present = None if present is None else present[:, known]
        terms = {}
        for name in self.names:
            options = {"temperature": settings.temperature or OWN_TEMPERATURE.get(name, 1.0), "valid": valid}
            if name == "icsd":
                options |= {
                    "normalize": settings.icsd_normalize,
                    "symmetric": settings.icsd_direction == "symmetric",
                    "classes": present,
                }
            if name == "kd":
                # Its mean is over all that is labelled, as that of cross-entropy, and what is left out counts as 0 in it. A mean
                # over what is left would be another one in each part of a step.
                options |= {"valid": counted, "weight": weight * valid}
            terms[name] = LOGIT_LOSSES[name](student, teacher, **options)
            if name == "kd" and settings.mask_ignored:  # the others are means over images
                terms[name] = terms[name] * fair_share(batch, size)
        return terms

    def _lambdas(self, terms: dict[str, Tensor], anchor: Tensor, step: int) -> dict[str, float]:
        """Return each teacher term's λ: as set, or such that its gradient is `balance` times that of cross-entropy."""
        settings = self.settings
        if settings.balance is None:
            rivals = OWN_LAMBDA if settings.lambda_rival is None else dict.fromkeys(OWN_LAMBDA, settings.lambda_rival)
            lambdas = {"kd": settings.lambda_kd, "icsd": settings.lambda_icsd, **rivals}
            return {name: lambdas[name] for name in self.names}
        sums = dict(self.state.named_buffers())
        if step < BALANCE_STEPS:
            squares = torch.stack([_gradient_norm(term, anchor) for term in terms.values()]).square()
            squares = sum_over_processes(squares)  # those of the whole step, and the same weights in every process
            squares = torch.where(torch.isfinite(squares).all(), squares, 0.0)  # a broken step tells nothing
            for name, square in zip(terms, squares, strict=True):
                sums[f"squares_{name}"] += square
            self._balanced = None
        if self._balanced is None:
            norms = {name: sums[f"squares_{name}"].sqrt().item() for name in terms}
            ce = norms["ce"]
            self._balanced = {n: settings.balance * ce / max(norms[n], 1e-6 * ce, 1e-30) for n in self.names}
        return self._balanced

    def _weights(self, lambdas: dict[str, float], step: int, total_steps: int) -> tuple[dict[str, float], float | None]:
        """Return what each term is multiplied with, and α."""
        settings = self.settings
        weights = {"ce": 1.0, **lambdas}
        if "icsd" in weights:
            weights["icsd"] *= warmup_share(step, total_steps, settings.icsd_warmup)
        shape = ("linear" if settings.method == "aicsd" else "off") if settings.alw == "auto" else settings.alw
        if shape == "off":
            return weights, None
        alpha = alw_alpha(
            step,
            total_steps,
            shape=shape,
            start=settings.alw_start,
            end=settings.alw_end,
            steps_per_epoch=-(-total_steps // self._epochs) if settings.alw_per == "epoch" else None,
        )
        alone = self.names == ("icsd",)
        for name in weights:
            with_labels = name == "ce" or (name == "icsd" and not alone and settings.alw_routing != "all-fade")
            if not with_labels:
                weights[name] *= 1 - alpha
            elif settings.alw_routing != "kd-fades":
                weights[name] *= alpha
        return weights, alpha


def cross_entropy(logits_BCHW: Tensor, labels_BHW: Tensor) -> Tensor:
    """Return the mean cross-entropy over the labelled pixels, at the size of the labels; 0 where none is labelled."""
    full_BCHW = F.interpolate(logits_BCHW.float(), size=labels_BHW.shape[1:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(full_BCHW, labels_BHW, ignore_index=IGNORE_LABEL, reduction="sum")
    return total / (labels_BHW != IGNORE_LABEL).sum().clamp(min=1)


def fair_share(batch: Batch, size_hw: Sequence[int]) -> Tensor | float:
    """Return what to multiply a mean over this batch's labelled pixels with, so that all parts of a step average to its mean.

    A step may be cut into parts, one after the other and over processes, that have different numbers of labelled pixels.

    Args:
        batch: a part, or all of what this process sees in the step.
        size_hw: the size at which the pixels are counted, as by `labels_at`.
    """
    processes = world_size()
    if batch.step_labels_BHW is None and processes == 1:
        return 1.0
    step_labels = batch.labels_BHW if batch.step_labels_BHW is None else batch.step_labels_BHW
    here = _labelled_pixels(batch.labels_BHW, size_hw)
    everywhere = sum_over_processes(_labelled_pixels(step_labels, size_hw))
    parts = processes * step_labels.shape[0] / batch.labels_BHW.shape[0]
    return here * parts / everywhere.clamp(min=1)


def _labelled_pixels(labels_BHW: Tensor, size_hw: Sequence[int]) -> Tensor:
    return (labels_at(labels_BHW, size_hw) != IGNORE_LABEL).sum()


def _ordinary(tensor: Tensor) -> Tensor:
    """Return a float32 copy, which a loss may save for its backward as it may not what inference mode made."""
    return tensor.to(torch.float32, copy=True)


def labels_at(labels_BHW: Tensor, size_hw: Sequence[int]) -> Tensor:
    """Return the labels at another size, int64 (B, h, w), each that of the nearest pixel."""
    return F.interpolate(labels_BHW.unsqueeze(1).float(), size=tuple(size_hw), mode="nearest-exact").squeeze(1).long()


def classes_present(logits_BCHW: Tensor, labels_BHW: Tensor) -> Tensor:
    """Return which classes the logits or the labels of each image have anywhere, bool (B, C)."""
    batch, classes = logits_BCHW.shape[:2]
    found = torch.zeros(batch, classes + 1, dtype=torch.bool, device=logits_BCHW.device)
    for labels in (logits_BCHW.argmax(dim=1), labels_BHW.clamp(max=classes)):  # the last column takes the ignored ones
        found.scatter_(1, labels.flatten(1), True)
    return found[:, :classes]


def probability_of_labels(logits_BCHW: Tensor, labels_BHW: Tensor) -> Tensor:
    """Return the probability that the logits give to each pixel's label, (B, H, W); 1 for ignored pixels."""
    ignored = labels_BHW == IGNORE_LABEL
    chosen = labels_BHW.masked_fill(ignored, 0).unsqueeze(1)
    given = torch.softmax(logits_BCHW.float(), dim=1).gather(1, chosen).squeeze(1)
    return given.masked_fill(ignored, 1.0)


def _averaged(images_BCHW: Tensor, size: Sequence[int]) -> Tensor:
    """Return pictures at a smaller size, as frames are made smaller that the student is given later."""
    if images_BCHW.shape[2:] == tuple(size):
        return images_BCHW
    return F.interpolate(images_BCHW.float(), size=tuple(size), mode="area").round()


def _resized(logits_BCHW: Tensor, size: Sequence[int]) -> Tensor:
    if logits_BCHW.shape[2:] == tuple(size):
        return logits_BCHW
    return F.interpolate(logits_BCHW.float(), size=tuple(size), mode="bilinear", align_corners=False)


def _gradient_norm(term: Tensor, anchor: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(term * GRADIENT_SCALE, anchor, retain_graph=True)
    norm: Tensor = gradient.float().norm() / GRADIENT_SCALE
    return norm
