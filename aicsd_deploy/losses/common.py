"""What the losses share: checks of what they are given, and the precision they work in."""

from __future__ import annotations

import torch
from torch import Tensor


def check_pair(student: Tensor, teacher: Tensor, *, temperature: float, valid: Tensor | None) -> None:
    """Raise ValueError unless both are (B, C, H, W) of one shape, the temperature is above 0 and `valid` fits (`check_valid`)."""
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have the same shape")
    check_map(student)
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    check_valid(valid, student)


def check_map(*maps: Tensor) -> None:
    """Raise ValueError unless each is (B, C, H, W)."""
    for values in maps:
        if values.ndim != 4:
            raise ValueError(f"logits and features must be (B, C, H, W), not {tuple(values.shape)}")


def check_valid(valid: Tensor | None, values: Tensor) -> None:
    """Raise ValueError unless `valid` is None or bool (B, H, W) for `values` (B, C, H, W)."""
    expected = (values.shape[0], *values.shape[2:])
    if valid is not None and (valid.shape != expected or valid.dtype != torch.bool):
        raise ValueError(f"valid must be bool {expected}, not {valid.dtype} {tuple(valid.shape)}")


def precise(values: Tensor) -> Tensor:
    """Return `values` in float32, or as they are in float64: half precision is too coarse for sums over an image."""
    return values if values.dtype == torch.float64 else values.float()


def spatial_log_softmax(logits: Tensor, *, temperature: float, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return log P and P, both (B, C, N): how each class spreads over the N positions of its image.

    Positions that are not valid have P = 0 and log P = 0; an image without any valid one has log P = 0 alone, which leaves
    nothing of a product of the two. Call it outside autocast.
    """
    z_BCN = precise(logits).flatten(2) / temperature
    if valid is None:
        logp_BCN = torch.log_softmax(z_BCN, dim=2)
        return logp_BCN, logp_BCN.exp()
    left_out_B1N = ~valid.flatten(1).unsqueeze(1)
    # The lowest finite value instead of -inf: an image without valid positions then gives numbers, not NaN.
    logp_BCN = torch.log_softmax(z_BCN.masked_fill(left_out_B1N, torch.finfo(z_BCN.dtype).min), dim=2)
    return logp_BCN.masked_fill(left_out_B1N, 0.0), logp_BCN.exp()
