"""The ICSD loss against values from the definitions, and every property that follows from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aicsd_deploy.losses.icsd import ics_matrix, icsd_loss
from aicsd_deploy.losses.pixel_kd import pixel_kd_loss


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_plain_loops(z: Tensor) -> Tensor:
    """Equation 2, one number at a time."""
    batch, classes = z.shape[:2]
    matrix = torch.zeros(batch, classes, classes, dtype=z.dtype)
    for b in range(batch):
        spread = [torch.exp(z[b, c].flatten()) / torch.exp(z[b, c].flatten()).sum() for c in range(classes)]
        for i in range(classes):
            for j in range(classes):
                matrix[b, i, j] = sum(p * torch.log(p / q) for p, q in zip(spread[i], spread[j], strict=True))
    return matrix


def test_matches_the_oracles(shared: Path) -> None:
    cases = json.loads((shared / "oracles" / "icsd.json").read_text())["cases"]
    assert len(cases) >= 4
    for case in cases:
        s, t = (torch.tensor(case[k], dtype=torch.float64) for k in ("student", "teacher"))
        options = {"temperature": case["temperature"], "valid": torch.tensor(case["valid"]).bool()}
        for ours, expected in (
            (ics_matrix(s, **options), case["ics_student"]),
            (ics_matrix(t, **options), case["ics_teacher"]),
            (icsd_loss(s, t, normalize="none", **options), case["icsd_none"]),
            (icsd_loss(s, t, normalize="row", **options), case["icsd_row"]),
            (pixel_kd_loss(s, t, **options), case["pixel_kl"]),
        ):
            torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)


def test_matches_plain_loops() -> None:
    z = logits(2, 3, 4, 5)
    torch.testing.assert_close(ics_matrix(z), by_plain_loops(z), rtol=0, atol=1e-12)
    torch.testing.assert_close(ics_matrix(z, temperature=3.0), by_plain_loops(z / 3), rtol=0, atol=1e-12)


def test_float32_is_enough_for_classes_that_lie_close_together() -> None:
    z = logits(1, 19, 129, 129) / 20
    apart = ~torch.eye(19, dtype=torch.bool)
    exact, found = (ics_matrix(each)[0][apart] for each in (z, z.float()))
    assert ((found - exact).abs() / exact).max() < 3e-4, "six times as much if the classes' mean is left in"


def test_by_default_it_is_the_paper_s_matrix_with_rows_of_length_one() -> None:
    s, t = logits(2, 5, 6, 6), logits(2, 5, 6, 6, seed=1)
    rows = [by_plain_loops(z) / by_plain_loops(z).norm(dim=2, keepdim=True) for z in (s, t)]
    torch.testing.assert_close(icsd_loss(s, t), (rows[0] - rows[1]).square().mean())


def test_diagonal_is_zero_and_nothing_is_negative() -> None:
    matrix = ics_matrix(logits(3, 6, 9, 9).float())
    assert matrix.diagonal(dim1=1, dim2=2).abs().max() == 0
    assert matrix.min() >= -1e-6
    assert matrix.max() > 0.1


def test_a_constant_added_to_a_class_changes_nothing() -> None:
    z = logits(2, 4, 6, 6)
    torch.testing.assert_close(ics_matrix(z + torch.tensor([3.0, -7, 0, 50]).view(1, 4, 1, 1)), ics_matrix(z))


def test_permuting_the_classes_permutes_the_matrix_and_keeps_the_loss() -> None:
    s, t, order = logits(2, 5, 6, 6), logits(2, 5, 6, 6, seed=1), torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(ics_matrix(s[:, order]), ics_matrix(s)[:, order][:, :, order])
    torch.testing.assert_close(icsd_loss(s[:, order], t[:, order]), icsd_loss(s, t))


@pytest.mark.parametrize("normalize", ["row", "none"])
def test_loss_is_zero_for_equal_networks_only(normalize: str) -> None:
    s = logits(2, 5, 6, 6)
    assert icsd_loss(s, s.clone(), normalize=normalize) == 0
    assert icsd_loss(s, logits(2, 5, 6, 6, seed=1), normalize=normalize) > 1e-4


def test_row_form_is_bounded() -> None:
    for classes in (3, 5, 19):  # with two, every row has one entry and length 1 makes them equal
        s, t = 20 * logits(2, classes, 8, 8), 20 * logits(2, classes, 8, 8, seed=1)
        assert 0 < icsd_loss(s, t) <= 2 / classes


def test_batch_of_eight_is_the_mean_of_four_batches_of_two() -> None:
    s, t = logits(8, 4, 6, 6), logits(8, 4, 6, 6, seed=1)
    parts = torch.stack([icsd_loss(s[i : i + 2], t[i : i + 2]) for i in range(0, 8, 2)])
    torch.testing.assert_close(icsd_loss(s, t), parts.mean())


@pytest.mark.parametrize("normalize", ["row", "none"])
def test_masked_equals_cropped(normalize: str) -> None:
    s, t = logits(2, 4, 8, 8), logits(2, 4, 8, 8, seed=1)
    valid = torch.zeros(2, 8, 8, dtype=torch.bool)
    valid[:, 1:6, 2:7] = True
    cropped = icsd_loss(s[:, :, 1:6, 2:7], t[:, :, 1:6, 2:7], normalize=normalize)
    torch.testing.assert_close(icsd_loss(s, t, valid=valid, normalize=normalize), cropped)


def test_masked_positions_get_no_gradient() -> None:
    s, t = logits(1, 3, 4, 4).requires_grad_(), logits(1, 3, 4, 4, seed=1)
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    valid[0, 0] = False
    icsd_loss(s, t, valid=valid).backward()
    assert s.grad is not None
    assert s.grad[:, :, 0].abs().max() == 0
    assert s.grad[:, :, 1:].abs().max() > 0


@pytest.mark.parametrize("normalize", ["row", "none"])
def test_gradient_is_the_derivative(normalize: str) -> None:
    s, t = logits(2, 3, 3, 4).requires_grad_(), logits(2, 3, 3, 4, seed=1)
    valid = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)) > 0.2
    assert torch.autograd.gradcheck(lambda x: icsd_loss(x, t, valid=valid, normalize=normalize), (s,))


def test_no_gradient_reaches_the_teacher() -> None:
    s, t = logits(1, 3, 4, 4).requires_grad_(), logits(1, 3, 4, 4, seed=1).requires_grad_()
    (icsd_loss(s, t) + pixel_kd_loss(s, t)).backward()
    assert s.grad is not None
    assert t.grad is None


def test_autocast_changes_nothing() -> None:
    s, t = logits(2, 5, 9, 9).float(), logits(2, 5, 9, 9, seed=1).float()
    plain = icsd_loss(s, t), pixel_kd_loss(s, t)
    with torch.autocast("cpu", torch.bfloat16):
        cast = icsd_loss(s, t), pixel_kd_loss(s, t)
    assert plain == cast


def test_half_precision_logits_stay_finite() -> None:
    s = (60 * torch.randn(1, 5, 129, 129, generator=torch.Generator().manual_seed(0))).half()
    assert torch.isfinite(ics_matrix(s)).all()
    assert ics_matrix(s).dtype == torch.float32


def test_an_image_without_valid_pixels_gives_zero_not_nan() -> None:
    s, t = logits(2, 4, 5, 5).float().requires_grad_(), logits(2, 4, 5, 5, seed=1).float()
    valid = torch.ones(2, 5, 5, dtype=torch.bool)
    valid[1] = False
    loss = icsd_loss(s, t, valid=valid) + pixel_kd_loss(s, t, valid=valid)
    loss.backward()
    assert torch.isfinite(loss)
    assert s.grad is not None
    assert torch.isfinite(s.grad).all()
    assert s.grad[1].abs().max() == 0
    torch.testing.assert_close(icsd_loss(s, t, valid=valid), icsd_loss(s[:1], t[:1]) / 2)
    nothing = icsd_loss(s, t, valid=torch.zeros_like(valid)) + pixel_kd_loss(s, t, valid=torch.zeros_like(valid))
    assert nothing == 0


def test_a_fresh_head_with_equal_logits_stays_finite() -> None:
    s = torch.zeros(1, 4, 5, 5, requires_grad=True)
    icsd_loss(s, logits(1, 4, 5, 5).float()).backward()
    assert s.grad is not None
    assert torch.isfinite(s.grad).all()


def test_wrong_arguments_are_refused() -> None:
    z = logits(1, 3, 4, 4)
    with pytest.raises(ValueError, match="same shape"):
        icsd_loss(z, logits(1, 3, 4, 5))
    with pytest.raises(ValueError, match="temperature"):
        ics_matrix(z, temperature=0)
    with pytest.raises(ValueError, match="valid must be bool"):
        ics_matrix(z, valid=torch.ones(1, 4, 4))
    with pytest.raises(ValueError, match="normalize"):
        icsd_loss(z, z, normalize="column")  # type: ignore[arg-type]


def test_symmetric_form_compares_the_mean_of_both_directions() -> None:
    s, t = logits(2, 3, 4, 5), logits(2, 3, 4, 5, seed=1)
    both = [(m + m.transpose(1, 2)) / 2 for m in (ics_matrix(s), ics_matrix(t))]
    expected = (both[0] - both[1]).square().mean()
    torch.testing.assert_close(icsd_loss(s, t, symmetric=True, normalize="none"), expected)


def test_classes_that_do_not_count_are_as_if_they_were_not_there() -> None:
    s, t = logits(2, 4, 4, 5), logits(2, 4, 4, 5, seed=1)
    classes = torch.tensor([[True, False, True, True], [False, False, False, False]])
    for normalize in ("row", "none"):
        ours = icsd_loss(s, t, normalize=normalize, classes=classes)  # type: ignore[arg-type]
        kept = [z[:1, [0, 2, 3]] for z in (s, t)]
        torch.testing.assert_close(ours, icsd_loss(*kept, normalize=normalize) / 2)  # type: ignore[arg-type]
