"""Adaptive loss weighting (ALW): how the teacher's say fades over training.

Source: AICSD, arXiv 2308.04243, equations 6 and 7: L = α·(L_CE + λ_ICS·L_ICS) + (1 − α)·λ_KL·L_KL.
"""

from __future__ import annotations

import math
from typing import Literal

AlwShape = Literal["linear", "cosine", "quadratic"]


def alw_alpha(
    step: int,
    total_steps: int,
    *,
    shape: AlwShape = "linear",
    start: float = 0.0,
    end: float = 1.0,
    steps_per_epoch: int | None = None,
) -> float:
    """Return α for a step: it goes from `start` at the first step to `end` at the last.

    Args:
        step: optimiser steps done so far; 0 is the first step, `total_steps - 1` the last.
        total_steps: how many steps the whole training takes; a training of one step has α = `end`.
        shape: "linear" is equation 7; "cosine" is slow at both ends; "quadratic" is slow at first, so the teacher stays longer.
        start: α of the first step, 0 to 1.
        end: α of the last step, 0 to 1.
        steps_per_epoch: hold α over each epoch, as the paper does (α = e / (E − 1)); None moves it every step.

    Returns:
        A number between `start` and `end` for any step, so that a training that is run longer than planned stays valid.
    """
    if total_steps < 1:
        raise ValueError(f"total_steps must be 1 or more, not {total_steps}")
    if not (0 <= start <= 1 and 0 <= end <= 1):
        raise ValueError(f"start and end must lie in 0 to 1, not {start} and {end}")
    if steps_per_epoch is not None:
        step, total_steps = step // steps_per_epoch, -(-total_steps // steps_per_epoch)
    done = 1.0 if total_steps == 1 else min(max(step / (total_steps - 1), 0.0), 1.0)
    share = {"linear": done, "cosine": (1 - math.cos(math.pi * done)) / 2, "quadratic": done**2}[shape]
    return start + (end - start) * share


def warmup_share(step: int, total_steps: int, warmup: float) -> float:
    """Return the share of its weight that a term has which rises linearly over the first `warmup` (0 to 1) of training."""
    return 1.0 if warmup <= 0 else min((step + 1) / (warmup * total_steps), 1.0)
