"""Pixel-wise knowledge distillation.

Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, at every pixel, as
equation 4 of AICSD (arXiv 2308.04243) uses it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pixel_kd_loss(student: Tensor, teacher: Tensor, *, temperature: float = 1.0, valid: Tensor | None = None) -> Tensor:
    """Return the mean over pixels of KL(teacher || student) between the class distributions, times T squared.

    Args:
        student: logits (B, C, H, W).
        teacher: logits of the same shape; no gradient flows into them.
        temperature: T in softmax(z / T), above 0.
        valid: bool (B, H, W), the pixels that count; None counts all, and with none at all the loss is 0.

    Returns:
        A scalar, 0 or more, in at least float32.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have the same shape")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    precision = torch.float64 if student.dtype == torch.float64 else torch.float32
    with torch.autocast(student.device.type, enabled=False):
        log_student_BCHW = F.log_softmax(student.to(precision) / temperature, dim=1)
        log_teacher_BCHW = F.log_softmax(teacher.detach().to(precision) / temperature, dim=1)
        kl_BHW = F.kl_div(log_student_BCHW, log_teacher_BCHW, reduction="none", log_target=True).sum(dim=1)
        if valid is not None:
            if valid.shape != kl_BHW.shape or valid.dtype != torch.bool:
                raise ValueError(f"valid must be bool {tuple(kl_BHW.shape)}, not {valid.dtype} {tuple(valid.shape)}")
            kl_BHW = kl_BHW * valid
        count = kl_BHW.numel() if valid is None else valid.sum().clamp(min=1)
        return kl_BHW.sum() / count * temperature**2
