"""Which terms a method has, how they are weighted, and what the teacher is not allowed to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from aicsd_deploy.data.loader import Batch
from aicsd_deploy.distiller import Distiller, cross_entropy, valid_at
from aicsd_deploy.losses.icsd import icsd_loss
from aicsd_deploy.losses.pixel_kd import pixel_kd_loss


class Network(nn.Module):
    """Logits at a quarter of the size, with dropout and batch normalisation that show whether it is in eval mode."""

    def __init__(self, seed: int, stride: int = 4) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, stride, stride), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Conv2d(8, 3, 1)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.layers(images.float() / 255)
        return logits


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (2, 16, 16), generator=generator)
    labels[:, :4] = 255
    return Batch(torch.randint(0, 256, (2, 3, 16, 16), generator=generator, dtype=torch.uint8), labels)


@pytest.mark.parametrize(
    ("method", "terms"),
    [("none", {"ce"}), ("kd", {"ce", "kd"}), ("icsd", {"ce", "icsd"}), ("aicsd", {"ce", "kd", "icsd"})],
)
def test_each_method_has_its_terms(method: str, terms: set[str], batch: Batch) -> None:
    teacher = None if method == "none" else Network(1)
    breakdown = Distiller(Network(0), teacher, method)(batch, step=1, total_steps=3)  # type: ignore[arg-type]
    assert set(breakdown.terms) == set(breakdown.weights) == terms
    expected = sum(breakdown.terms[k].item() * breakdown.weights[k] for k in terms)
    assert breakdown.total.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("step", "alpha"), [(0, 0.0), (1, 0.25), (4, 1.0)])
def test_aicsd_is_equation_6(step: int, alpha: float, batch: Batch) -> None:
    student, teacher = Network(0).eval(), Network(1).eval()
    distiller = Distiller(student, teacher, "aicsd", lambda_icsd=7.0, lambda_kd=3.0, temperature=2.0)
    breakdown = distiller(batch, step=step, total_steps=5)
    s, t = student(batch.images_BCHW), teacher(batch.images_BCHW)
    valid = torch.ones(2, 4, 4, dtype=torch.bool)
    valid[:, 0] = False
    ics = icsd_loss(s, t, temperature=2.0, valid=valid)
    kd = pixel_kd_loss(s, t, temperature=2.0, valid=valid)
    expected = alpha * (cross_entropy(s, batch.labels_BHW) + 7 * ics) + (1 - alpha) * 3 * kd
    assert breakdown.alpha == alpha
    torch.testing.assert_close(breakdown.total, expected)


def test_the_teacher_stays_in_eval_mode_and_without_gradient(batch: Batch) -> None:
    student, teacher = Network(0), Network(1)
    distiller = Distiller(student, teacher, "aicsd")
    teacher.train()  # as a careless caller would
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    distiller(batch, step=1, total_steps=3).total.backward()
    assert not teacher.training
    assert not any(m.training for m in teacher.modules())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(v, teacher.state_dict()[k]) for k, v in before.items())
    assert all(p.grad is not None for p in student.parameters())
    assert student.training


def test_a_teacher_of_another_stride_is_brought_to_the_students_size(batch: Batch) -> None:
    breakdown = Distiller(Network(0, stride=4), Network(1, stride=2), "aicsd")(batch, step=1, total_steps=3)
    assert breakdown.logits_BCHW.shape[2:] == (4, 4)
    assert breakdown.terms["kd"] > 0


def test_ignored_pixels_count_in_no_term(batch: Batch) -> None:
    student, teacher = Network(0).eval(), Network(1).eval()
    nothing = Batch(batch.images_BCHW, torch.full_like(batch.labels_BHW, 255))
    breakdown = Distiller(student, teacher, "aicsd")(nothing, step=1, total_steps=3)
    assert all(term == 0 for term in breakdown.terms.values())
    breakdown.total.backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in student.parameters())


def test_gradient_norms_are_those_of_the_weighted_terms(batch: Batch) -> None:
    breakdown = Distiller(Network(0), Network(1), "kd", lambda_kd=5.0)(batch, step=1, total_steps=3)
    norms = breakdown.gradient_norms()
    (expected,) = torch.autograd.grad(5.0 * breakdown.terms["kd"], breakdown.logits_BCHW, retain_graph=True)
    assert norms["kd"] == pytest.approx(expected.norm().item(), rel=1e-5)
    assert norms["ce"] > 0


def test_valid_at_takes_the_nearest_pixel() -> None:
    labels = torch.zeros(1, 8, 8, dtype=torch.long)
    labels[0, :, 4:] = 255
    assert valid_at(labels, (2, 2)).tolist() == [[[True, False], [True, False]]]


def test_a_method_and_its_teacher_go_together() -> None:
    with pytest.raises(ValueError, match="needs a teacher"):
        Distiller(Network(0), None, "aicsd")
    with pytest.raises(ValueError, match="takes no teacher"):
        Distiller(Network(0), Network(1), "none")
