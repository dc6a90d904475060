"""Adaptive loss weighting (ALW): how the teacher's say fades over training.

Source: AICSD, arXiv 2308.04243, equations 6 and 7: L = α·(L_CE + λ_ICS·L_ICS) + (1 − α)·λ_KL·L_KL.
"""

from __future__ import annotations


def alw_alpha(step: int, total_steps: int) -> float:
    """Return α for a step: it rises in a straight line from 0 at the first step to 1 at the last.

    Args:
        step: optimiser steps done so far; 0 is the first step, `total_steps - 1` the last.
        total_steps: how many steps the whole training takes; a training of one step has α = 1.

    Returns:
        A number in [0, 1] for any step, so that a training that is run longer than planned stays valid.
    """
    if total_steps < 1:
        raise ValueError(f"total_steps must be 1 or more, not {total_steps}")
    if total_steps == 1:
        return 1.0
    return min(max(step / (total_steps - 1), 0.0), 1.0)
