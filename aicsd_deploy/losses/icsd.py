"""Inter-class similarity distillation (ICSD).

Source: Mansourian, Ahmadi, Kasaei, "AICSD: Adaptive Inter-Class Similarity Distillation for Semantic Segmentation",
arXiv 2308.04243, equations 1 to 3.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ROW_NORM_EPS = 1e-6


def ics_matrix(logits: Tensor, *, temperature: float = 1.0, valid: Tensor | None = None) -> Tensor:
    """Return how differently every pair of classes spreads over an image: M_ij = KL(P_i || P_j).

    P_c is the distribution of class c over the positions of the image: softmax over space, one per class and image.
    Worked out as one matrix product, in at least float32 and outside autocast, which would cast it down.

    Args:
        logits: (B, C, H, W).
        temperature: T in P_c = softmax(z_c / T), above 0.
        valid: bool (B, H, W), the positions that count; None counts all. An image without any gives a zero matrix.

    Returns:
        (B, C, C), not negative (but for rounding), zero on the diagonal; float32, or float64 for float64 logits.
    """
    _check(logits, temperature, valid)
    with torch.autocast(logits.device.type, enabled=False):
        z_BCN = logits.to(_precision(logits)).flatten(2) / temperature
        mask_B1N = None if valid is None else valid.flatten(1).unsqueeze(1)
        if mask_B1N is not None:
            # The lowest finite value instead of -inf: an image without valid positions then gives numbers, not NaN.
            z_BCN = z_BCN.masked_fill(~mask_B1N, torch.finfo(z_BCN.dtype).min)
        logp_BCN = F.log_softmax(z_BCN, dim=2)
        p_BCN = logp_BCN.exp()
        if mask_B1N is not None:
            p_BCN = p_BCN * mask_B1N
            logp_BCN = logp_BCN.masked_fill(~mask_B1N, 0.0)
        # Taking the classes' mean off at each position leaves every difference as it is and makes the numbers smaller.
        logp_BCN = logp_BCN - logp_BCN.mean(dim=1, keepdim=True)
        cross_BCC = p_BCN @ logp_BCN.transpose(1, 2)
        return cross_BCC.diagonal(dim1=1, dim2=2).unsqueeze(2) - cross_BCC


def icsd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    valid: Tensor | None = None,
    normalize: Literal["row", "none"] = "row",
) -> Tensor:
    """Return the mean squared difference between the student's and the teacher's inter-class similarity matrices.

    Args:
        student: logits (B, C, H, W).
        teacher: logits of the same shape; no gradient flows into them.
        temperature: see `ics_matrix`.
        valid: bool (B, H, W), the positions that count; None counts all.
        normalize: "row" gives every row of both matrices length 1 first, which bounds the loss by 2/C and lets its
            weight carry over between image sizes; "none" compares the raw divergences.

    Returns:
        A scalar, 0 or more: the mean over images of the mean over the C x C entries (equation 3).
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have the same shape")
    if normalize not in ("row", "none"):
        raise ValueError(f"normalize must be 'row' or 'none', not {normalize!r}")
    with torch.no_grad():
        teacher_BCC = ics_matrix(teacher.detach(), temperature=temperature, valid=valid)
    student_BCC = ics_matrix(student, temperature=temperature, valid=valid)
    if normalize == "row":
        student_BCC = F.normalize(student_BCC, dim=2, eps=ROW_NORM_EPS)
        teacher_BCC = F.normalize(teacher_BCC, dim=2, eps=ROW_NORM_EPS)
    return (student_BCC - teacher_BCC).square().mean()


def _precision(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _check(logits: Tensor, temperature: float, valid: Tensor | None) -> None:
    if logits.ndim != 4:
        raise ValueError(f"logits must be (B, C, H, W), not {tuple(logits.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    if valid is not None and (valid.shape != (logits.shape[0], *logits.shape[2:]) or valid.dtype != torch.bool):
        raise ValueError(
            f"valid must be bool {(logits.shape[0], *logits.shape[2:])}, not {valid.dtype} {tuple(valid.shape)}"
        )
