"""ALW's α from the first step to the last and past it."""

from __future__ import annotations

from itertools import pairwise

import pytest

from aicsd_deploy.losses.schedule import alw_alpha


@pytest.mark.parametrize("total", [2, 3, 7, 1000])
def test_rises_evenly_from_zero_to_one(total: int) -> None:
    alphas = [alw_alpha(step, total) for step in range(total)]
    assert alphas[0] == 0
    assert alphas[-1] == 1
    steps = [b - a for a, b in pairwise(alphas)]
    assert min(steps) == pytest.approx(1 / (total - 1))
    assert max(steps) == pytest.approx(1 / (total - 1))


def test_stays_in_range_past_the_end_and_for_one_step() -> None:
    assert alw_alpha(5000, 100) == 1
    assert alw_alpha(0, 1) == 1
    with pytest.raises(ValueError, match="total_steps"):
        alw_alpha(0, 0)
