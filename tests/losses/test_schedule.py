"""ALW's α from the first step to the last and past it."""

from __future__ import annotations

from itertools import pairwise

import pytest

from aicsd_deploy.losses.schedule import alw_alpha, warmup_share


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


def test_shapes_start_and_end() -> None:
    for shape, middle in (("linear", 0.5), ("cosine", 0.5), ("quadratic", 0.25)):
        alphas = [alw_alpha(step, 5, shape=shape) for step in range(5)]  # type: ignore[arg-type]
        assert alphas[0] == 0
        assert alphas[2] == pytest.approx(middle)
        assert alphas[4] == 1
        assert alphas == sorted(alphas)
    assert alw_alpha(0, 5, start=0.2, end=0.6) == 0.2
    assert alw_alpha(4, 5, start=0.2, end=0.6) == pytest.approx(0.6)
    with pytest.raises(ValueError, match="0 to 1"):
        alw_alpha(0, 5, start=-0.1)


def test_per_epoch_alpha_stands_still_within_an_epoch() -> None:
    alphas = [alw_alpha(step, 12, steps_per_epoch=4) for step in range(12)]
    assert alphas == [0.0] * 4 + [0.5] * 4 + [1.0] * 4


def test_warmup_rises_to_one() -> None:
    assert [warmup_share(step, 8, 0.5) for step in range(8)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert warmup_share(0, 8, 0.0) == 1
