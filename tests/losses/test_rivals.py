"""The methods to compare with, against plain loops over the equations of their papers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from aicsd_deploy.losses.attention import attention_loss
from aicsd_deploy.losses.cwd import cwd_loss
from aicsd_deploy.losses.dist import dist_loss
from aicsd_deploy.losses.ickd import ickd_loss
from aicsd_deploy.losses.icsd import icsd_loss
from aicsd_deploy.losses.pixel_kd import pixel_kd_loss
from aicsd_deploy.losses.similarity import similarity_loss

Loss = Callable[..., Tensor]
ON_LOGITS: list[Loss] = [pixel_kd_loss, icsd_loss, cwd_loss, dist_loss]
ON_FEATURES: list[Loss] = [attention_loss, similarity_loss, ickd_loss]
ALL = ON_LOGITS + ON_FEATURES


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second = (2 * torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return first, second


def close(ours: Tensor, expected: float) -> None:
    assert ours.item() == pytest.approx(expected, rel=1e-7)


def softmax(values: list[float]) -> list[float]:
    exponentials = [math.exp(v) for v in values]
    return [e / sum(exponentials) for e in exponentials]


def pearson(a: list[float], b: list[float]) -> float:
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    top = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    return top / math.sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))


def unit(values: list[float]) -> list[float]:
    length = math.sqrt(sum(v * v for v in values))
    return [v / length for v in values]


def squared_distance(a: list[float], b: list[float]) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def test_cwd_by_plain_loops() -> None:
    s, t = pair(2, 3, 4, 5)
    expected = 0.0
    for b in range(2):
        for c in range(3):
            p, q = (softmax((z[b, c].flatten() / 2).tolist()) for z in (t, s))
            expected += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)) * 2**2 / (2 * 3)
    close(cwd_loss(s, t, temperature=2.0), expected)


def test_cwd_by_hand() -> None:
    # One class at two positions: the teacher 3 : 1, the student 1 : 1.
    teacher = torch.tensor([math.log(3), 0.0], dtype=torch.float64).view(1, 1, 1, 2)
    close(cwd_loss(torch.zeros_like(teacher), teacher, temperature=1.0), 0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_dist_by_plain_loops() -> None:
    s, t = pair(2, 3, 2, 3)
    rows_s, rows_t = (
        [softmax((z[b, :, y, x] / 2).tolist()) for b in range(2) for y in range(2) for x in range(3)] for z in (s, t)
    )
    inter = sum(1 - pearson(a, b) for a, b in zip(rows_s, rows_t, strict=True)) / len(rows_s)
    columns_s, columns_t = (list(map(list, zip(*rows, strict=True))) for rows in (rows_s, rows_t))
    intra = sum(1 - pearson(a, b) for a, b in zip(columns_s, columns_t, strict=True)) / 3
    close(dist_loss(s, t, temperature=2.0, inter=0.7, intra=1.3), 4 * (0.7 * inter + 1.3 * intra))
    close(dist_loss(s, t, temperature=2.0), 4 * (inter + intra))


def test_attention_by_plain_loops() -> None:
    s, _ = pair(2, 3, 2, 3)
    _, t = pair(2, 5, 2, 3)
    expected = 0.0
    for b in range(2):
        looked = [
            unit([sum(f[b, c, y, x].item() ** 2 for c in range(f.shape[1])) for y in range(2) for x in range(3)])
            for f in (s, t)
        ]
        expected += squared_distance(*looked) / 2
    close(attention_loss(s, t), expected)
    assert attention_loss(s, t.repeat_interleave(2, 2)) >= 0, (
        "a teacher of another stride is brought to the student's size"
    )


def test_similarity_by_plain_loops() -> None:
    s, _ = pair(3, 2, 2, 2)
    _, t = pair(3, 4, 3, 1)
    rows = [[unit([(f[i] * f[j]).sum().item() for j in range(3)]) for i in range(3)] for f in (s, t)]
    close(similarity_loss(s, t), sum(squared_distance(a, b) for a, b in zip(*rows, strict=True)) / 9)


def test_ickd_by_plain_loops() -> None:
    s, t = pair(2, 3, 2, 2)
    expected = 0.0
    for b in range(2):
        rows = [[unit([(f[b, i] * f[b, j]).sum().item() for j in range(3)]) for i in range(3)] for f in (s, t)]
        expected += sum(squared_distance(a, b) for a, b in zip(*rows, strict=True)) / (2 * 3)
    close(ickd_loss(s, t), expected)


@pytest.mark.parametrize("loss", ALL)
def test_nothing_to_learn_from_oneself_and_no_gradient_to_the_teacher(loss: Loss) -> None:
    s, t = pair(3, 4, 3, 3)
    assert abs(loss(s, s).item()) < 1e-10
    s.requires_grad_(), t.requires_grad_()
    loss(s, t).backward()
    assert t.grad is None
    assert s.grad is not None
    assert s.grad.abs().max() > 0
    same = pair(3, 4, 3, 3)[0].requires_grad_()
    loss(same, same.detach().clone()).backward()
    assert same.grad is not None
    assert torch.isfinite(same.grad).all()


@pytest.mark.parametrize("loss", ALL)
def test_gradient_is_the_derivative(loss: Loss) -> None:
    s, t = pair(2, 3, 2, 2)
    assert torch.autograd.gradcheck(lambda x: loss(x, t), (s.requires_grad_(),))


@pytest.mark.parametrize("loss", ALL)
def test_half_precision_and_autocast_are_computed_in_float32(loss: Loss) -> None:
    s, t = (v.bfloat16() for v in pair(2, 5, 8, 8))
    plain = loss(s.float(), t.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(s, t)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("loss", ON_LOGITS)
def test_masked_equals_cropped(loss: Loss) -> None:
    s, t = pair(2, 3, 4, 6)
    valid = torch.zeros(2, 4, 6, dtype=torch.bool)
    valid[:, :, :4] = True
    torch.testing.assert_close(loss(s, t, valid=valid), loss(s[..., :4], t[..., :4]))


@pytest.mark.parametrize("loss", ON_LOGITS)
def test_no_valid_pixel_gives_zero_and_no_gradient(loss: Loss) -> None:
    s, t = pair(2, 3, 4, 6)
    value = loss(s.requires_grad_(), t, valid=torch.zeros(2, 4, 6, dtype=torch.bool))
    value.backward()
    assert value == 0
    assert s.grad is not None
    assert s.grad.abs().max() == 0


@pytest.mark.parametrize("loss", ON_LOGITS)
def test_wrong_shapes_are_refused(loss: Loss) -> None:
    s, t = pair(2, 3, 4, 6)
    with pytest.raises(ValueError, match="same shape"):
        loss(s, t[:, :2])
    with pytest.raises(ValueError, match="temperature"):
        loss(s, t, temperature=0.0)
    with pytest.raises(ValueError, match="valid"):
        loss(s, t, valid=torch.ones(2, 4, 5, dtype=torch.bool))
