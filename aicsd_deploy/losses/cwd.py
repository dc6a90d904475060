"""Channel-wise distillation (CWD).

Source: Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", arXiv 2011.13256, equations 3 and 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aicsd_deploy.losses.common import check_pair, spatial_log_softmax


def cwd_loss(student: Tensor, teacher: Tensor, *, temperature: float = 4.0, valid: Tensor | None = None) -> Tensor:
    """Return T² / C · Σ_c Σ_x φ(t_c)(x) · log(φ(t_c)(x) / φ(s_c)(x)), the mean over images; φ is the softmax over space.

    Args:
        student: logits (B, C, H, W).
        teacher: logits of the same shape; no gradient flows into them.
        temperature: T in φ(z) = softmax(z / T) over the positions of an image, above 0; the paper uses 4.
        valid: bool (B, H, W), the positions that count; None counts all, and an image without any counts as 0.

    Returns:
        A scalar, 0 or more, in at least float32.
    """
    check_pair(student, teacher, temperature=temperature, valid=valid)
    with torch.autocast(student.device.type, enabled=False):
        log_student_BCN, _ = spatial_log_softmax(student, temperature=temperature, valid=valid)
        log_teacher_BCN, teacher_BCN = spatial_log_softmax(teacher.detach(), temperature=temperature, valid=valid)
        kl_BC = (teacher_BCN * (log_teacher_BCN - log_student_BCN)).sum(dim=2)
        return kl_BC.mean() * temperature**2
