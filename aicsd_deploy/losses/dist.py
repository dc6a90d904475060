"""DIST: distillation by correlation instead of by value.

Source: Huang et al., "Knowledge Distillation from A Stronger Teacher", arXiv 2205.10536, equations 7 to 10.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aicsd_deploy.losses.common import check_pair, precise

EPS = 1e-8


def dist_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    valid: Tensor | None = None,
    inter: float = 1.0,
    intra: float = 1.0,
) -> Tensor:
    """Return inter · mean_x (1 − ρ(s_x, t_x)) + intra · mean_c (1 − ρ(s_c, t_c)), times T squared; ρ is Pearson's correlation.

    s_x are the class probabilities of one pixel, s_c those of one class over all pixels of the batch.

    Args:
        student: logits (B, C, H, W).
        teacher: logits of the same shape; no gradient flows into them.
        temperature: T in softmax(z / T) over the classes, above 0.
        valid: bool (B, H, W), the pixels that count; None counts all, and with none at all the loss is 0.
        inter: β, the weight of the relation between the classes of a pixel.
        intra: γ, the weight of the relation between the pixels of a class.

    Returns:
        A scalar, 0 to 2 · (inter + intra) · T², in at least float32.
    """
    check_pair(student, teacher, temperature=temperature, valid=valid)
    with torch.autocast(student.device.type, enabled=False):
        s_NC, t_NC = (
            torch.softmax(precise(z) / temperature, dim=1).permute(0, 2, 3, 1).flatten(0, 2)
            for z in (student, teacher.detach())
        )
        weight_N1 = torch.ones_like(s_NC[:, :1]) if valid is None else valid.reshape(-1, 1).to(s_NC.dtype)
        count = weight_N1.sum().clamp(min=1)
        s_pixel, t_pixel = (y - y.mean(dim=1, keepdim=True) for y in (s_NC, t_NC))
        pixels = ((1 - _cosine(s_pixel, t_pixel, dim=1)) * weight_N1[:, 0]).sum() / count
        s_class, t_class = ((y - (y * weight_N1).sum(dim=0, keepdim=True) / count) * weight_N1 for y in (s_NC, t_NC))
        any_valid = weight_N1.sum().clamp(max=1)
        classes = (1 - _cosine(s_class, t_class, dim=0)).mean() * any_valid
        return (inter * pixels + intra * classes) * temperature**2


def _cosine(a: Tensor, b: Tensor, *, dim: int) -> Tensor:
    """Return the cosine of the angle between vectors; of those with their mean taken off, it is Pearson's correlation."""
    # Under the root, so that the gradient is zero and not NaN where both vectors are zeros.
    lengths = (a.square().sum(dim) * b.square().sum(dim) + EPS**2).sqrt()
    return (a * b).sum(dim) / lengths
