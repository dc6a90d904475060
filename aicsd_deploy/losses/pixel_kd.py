"""Pixel-wise knowledge distillation (KD).

Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, at every pixel, as
equation 4 of AICSD (arXiv 2308.04243) uses it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aicsd_deploy.losses.common import check_pair, precise


def pixel_kd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    valid: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Return the mean over pixels of KL(teacher || student) between the class distributions, times T squared.

    The code of AICSD's authors takes the mean over classes too and has no T squared: its weight divided by C is ours.

    Args:
        student: logits (B, C, H, W).
        teacher: logits of the same shape; no gradient flows into them.
        temperature: T in softmax(z / T), above 0.
        valid: bool (B, H, W), the pixels that count; None counts all, and with none at all the loss is 0.
        weight: (B, H, W), what each pixel's divergence is multiplied with before the mean; None is 1.

    Returns:
        A scalar, 0 or more, in at least float32.
    """
    check_pair(student, teacher, temperature=temperature, valid=valid)
    with torch.autocast(student.device.type, enabled=False):
        log_student_BCHW = F.log_softmax(precise(student) / temperature, dim=1)
        log_teacher_BCHW = F.log_softmax(precise(teacher.detach()) / temperature, dim=1)
        kl_BHW = F.kl_div(log_student_BCHW, log_teacher_BCHW, reduction="none", log_target=True).sum(dim=1)
        if weight is not None:
            kl_BHW = kl_BHW * weight
        if valid is not None:
            kl_BHW = kl_BHW * valid
        count = kl_BHW.numel() if valid is None else valid.sum().clamp(min=1)
        return kl_BHW.sum() / count * temperature**2
