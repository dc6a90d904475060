"""Pixel-wise distillation, worked out by hand."""

from __future__ import annotations

import math

import torch

from aicsd_deploy.losses.pixel_kd import pixel_kd_loss


def test_two_pixels_by_hand() -> None:
    # Teacher sure of 3 : 1 at both pixels; the student is undecided at the first and agrees at the second.
    teacher = torch.tensor([[math.log(3), math.log(3)], [0.0, 0.0]], dtype=torch.float64).view(1, 2, 1, 2)
    student = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]], dtype=torch.float64).view(1, 2, 1, 2)
    first = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert math.isclose(pixel_kd_loss(student, teacher).item(), first / 2)
    only_first = torch.tensor([[[True, False]]])
    assert math.isclose(pixel_kd_loss(student, teacher, valid=only_first).item(), first)
    weight = torch.tensor([[[0.5, 9.0]]], dtype=torch.float64)
    assert math.isclose(pixel_kd_loss(student, teacher, weight=weight).item(), first / 4)


def test_temperature_softens_and_scales() -> None:
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(pixel_kd_loss(s, t, temperature=2.0), 4 * pixel_kd_loss(s / 2, t / 2))


def test_gradient_is_the_derivative() -> None:
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(2, 3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x: pixel_kd_loss(x, t, temperature=1.5), (s.requires_grad_(),))
