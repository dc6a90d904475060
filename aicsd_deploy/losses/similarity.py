"""Similarity-preserving distillation (SP).

Source: Tung, Mori, "Similarity-Preserving Knowledge Distillation", arXiv 1907.09682, equations 1 to 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aicsd_deploy.losses.common import check_map, precise


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return ‖G_s − G_t‖² / B², where G = Q Qᵀ with rows of length 1 says how alike the images of a batch are to a network.

    Args:
        student: features (B, C_s, H, W); Q is (B, C_s · H · W).
        teacher: features (B, C_t, h, w) of any other size; no gradient flows into them.

    Returns:
        A scalar, 0 to 4 / B, in at least float32. A batch of one image gives 0: there is nothing to compare.
    """
    check_map(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        g_student, g_teacher = (
            F.normalize(q @ q.transpose(0, 1), dim=1, eps=1e-6)
            for q in (precise(student).flatten(1), precise(teacher.detach()).flatten(1))
        )
        return (g_student - g_teacher).square().mean()
