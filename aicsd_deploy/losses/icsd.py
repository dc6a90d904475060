"""Inter-class similarity distillation (ICSD).

Source: Mansourian, Ahmadi, Kasaei, "AICSD: Adaptive Inter-Class Similarity Distillation for Semantic Segmentation",
arXiv 2308.04243, equations 1 to 3.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from aicsd_deploy.losses.common import check_map, check_pair, check_valid, spatial_log_softmax

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
    check_map(logits)
    check_valid(valid, logits)
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    with torch.autocast(logits.device.type, enabled=False):
        logp_BCN, p_BCN = spatial_log_softmax(logits, temperature=temperature, valid=valid)
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
    symmetric: bool = False,
    classes: Tensor | None = None,
) -> Tensor:
    """Return the mean squared difference between the student's and the teacher's inter-class similarity matrices.

    Args:
        student: logits (B, C, H, W).
        teacher: logits of the same shape; no gradient flows into them.
        temperature: see `ics_matrix`.
        valid: bool (B, H, W), the positions that count; None counts all.
        normalize: "row" gives every row of both matrices length 1 first, which bounds the loss by 2/C and lets its
            weight carry over between image sizes; "none" compares the raw divergences.
        symmetric: compare (M + Mᵀ) / 2, whose entries do not depend on which class of a pair comes first.
        classes: bool (B, C), the classes of each image whose rows and columns count; None counts all.

    Returns:
        A scalar, 0 or more: the mean over images of the mean over the C × C entries (equation 3), or over those of the
        classes that count; 0 for an image where none does.
    """
    check_pair(student, teacher, temperature=temperature, valid=valid)
    if normalize not in ("row", "none"):
        raise ValueError(f"normalize must be 'row' or 'none', not {normalize!r}")
    if classes is not None and (classes.shape != student.shape[:2] or classes.dtype != torch.bool):
        raise ValueError(f"classes must be bool {tuple(student.shape[:2])}, not {classes.dtype} {tuple(classes.shape)}")
    pairs_BCC = None if classes is None else classes.unsqueeze(1) & classes.unsqueeze(2)

    def compared(logits: Tensor) -> Tensor:
        matrix_BCC = ics_matrix(logits, temperature=temperature, valid=valid)
        if symmetric:
            matrix_BCC = (matrix_BCC + matrix_BCC.transpose(1, 2)) / 2
        if pairs_BCC is not None:
            matrix_BCC = matrix_BCC * pairs_BCC
        return F.normalize(matrix_BCC, dim=2, eps=ROW_NORM_EPS) if normalize == "row" else matrix_BCC

    with torch.no_grad():
        teacher_BCC = compared(teacher.detach())
    difference_BCC = (compared(student) - teacher_BCC).square()
    if pairs_BCC is None:
        return difference_BCC.mean()
    return (difference_BCC.sum(dim=(1, 2)) / pairs_BCC.sum(dim=(1, 2)).clamp(min=1)).mean()
