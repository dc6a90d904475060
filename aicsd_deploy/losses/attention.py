"""Attention transfer (AT; "AD" in the tables of AICSD).

Source: Zagoruyko, Komodakis, "Paying More Attention to Attention", arXiv 1612.03928, equation 2 with p = 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aicsd_deploy.losses.common import check_map, precise


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over images of ‖Q_s / ‖Q_s‖ − Q_t / ‖Q_t‖‖², where Q(x) = Σ_c F_c(x)² is where a network looks.

    Squared, as in the authors' code, so that the gradient exists where both are equal. That code takes the mean over positions
    too: its weight divided by H · W is ours.

    Args:
        student: features (B, C_s, H, W).
        teacher: features (B, C_t, h, w), brought to H × W bilinearly; no gradient flows into them.

    Returns:
        A scalar from 0 to 2, in at least float32.
    """
    check_map(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        target = precise(teacher.detach()).square().sum(dim=1, keepdim=True)
        if target.shape[2:] != student.shape[2:]:
            target = F.interpolate(target, size=student.shape[2:], mode="bilinear", align_corners=False)
        looked = precise(student).square().sum(dim=1)
        s_BN, t_BN = (F.normalize(q.flatten(1), dim=1, eps=1e-6) for q in (looked, target))
        return (s_BN - t_BN).square().sum(dim=1).mean()
