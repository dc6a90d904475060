"""Which terms a method has, how they are weighted, and what the teacher is not allowed to do."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aicsd_deploy.cli import Parser
from aicsd_deploy.config import DistillConfig, MethodConfig, add_config_flags, read_config, validated
from aicsd_deploy.data.loader import Batch
from aicsd_deploy.distiller import BALANCE_STEPS, Distiller, classes_present, cross_entropy, labels_at
from aicsd_deploy.errors import InputError
from aicsd_deploy.losses.cwd import cwd_loss
from aicsd_deploy.losses.icsd import icsd_loss
from aicsd_deploy.losses.pixel_kd import pixel_kd_loss
from aicsd_deploy.training.precision import lowered
from aicsd_deploy.training.resume import check_same_run


class Network(nn.Module):
    """Logits at a quarter of the size, with dropout and batch normalisation that show whether it is in eval mode."""

    def __init__(self, seed: int, stride: int = 4) -> None:
        super().__init__()
        torch.manual_seed(seed)
        width = 8 if stride == 4 else 12
        self.backbone = nn.Sequential(nn.Conv2d(3, width, stride, stride), nn.BatchNorm2d(width))
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(width, 3, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.backbone(images.float() / 255))
        return logits


def distiller(student: nn.Module, teacher: nn.Module | None, method: str, **settings: Any) -> Distiller:
    return Distiller(student, teacher, MethodConfig(method=method, **settings), image_size_hw=(16, 16))  # type: ignore[arg-type]


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (2, 16, 16), generator=generator)
    labels[:, :4] = 255
    return Batch(torch.randint(0, 256, (2, 3, 16, 16), generator=generator, dtype=torch.uint8), labels)


@pytest.mark.parametrize(
    ("method", "terms"),
    [("none", {"ce"}), ("aicsd", {"ce", "kd", "icsd"})]
    + [(name, {"ce", name}) for name in ("kd", "icsd", "cwd", "dist", "at", "sp", "ickd")],
)
def test_each_method_has_its_terms(method: str, terms: set[str], batch: Batch) -> None:
    teacher = None if method == "none" else Network(1)
    breakdown = distiller(Network(0), teacher, method)(batch, step=1, total_steps=3)
    assert set(breakdown.terms) == set(breakdown.weights) == terms
    expected = sum(breakdown.terms[k].item() * breakdown.weights[k] for k in terms)
    assert breakdown.total.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", ["aicsd", "at", "sp", "ickd"])
def test_a_teacher_whose_weights_are_bfloat16(method: str, batch: Batch) -> None:
    def loss(autocast: torch.dtype | None) -> float:
        student, teacher = Network(0).eval(), lowered(Network(1), autocast)
        torch.manual_seed(2)  # for ickd's adapter
        made = Distiller(student, teacher, MethodConfig(method=method), image_size_hw=(16, 16), autocast=autocast)  # type: ignore[arg-type]
        return made(batch, step=1, total_steps=3).total.item()

    assert loss(torch.bfloat16) == pytest.approx(loss(None), rel=0.05)


@pytest.mark.parametrize(("step", "alpha"), [(0, 0.0), (1, 0.25), (4, 1.0)])
def test_aicsd_is_equation_6(step: int, alpha: float, batch: Batch) -> None:
    student, teacher = Network(0).eval(), Network(1).eval()
    loss = distiller(student, teacher, "aicsd", lambda_icsd=7.0, lambda_kd=3.0, temperature=2.0)
    breakdown = loss(batch, step=step, total_steps=5)
    s, t = student(batch.images_BCHW), teacher(batch.images_BCHW)
    valid = torch.ones(2, 4, 4, dtype=torch.bool)
    valid[:, 0] = False
    ics = icsd_loss(s, t, temperature=2.0, valid=valid)
    kd = pixel_kd_loss(s, t, temperature=2.0, valid=valid)
    expected = alpha * (cross_entropy(s, batch.labels_BHW) + 7 * ics) + (1 - alpha) * 3 * kd
    assert breakdown.alpha == alpha
    # Logits as flat as these leave float32 four digits of ICSD.
    torch.testing.assert_close(breakdown.total, expected, rtol=1e-4, atol=0)


def test_the_teacher_stays_in_eval_mode_and_without_gradient(batch: Batch) -> None:
    student, teacher = Network(0), Network(1)
    loss = distiller(student, teacher, "aicsd")
    teacher.train()  # as a careless caller would
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    loss(batch, step=1, total_steps=3).total.backward()
    assert not teacher.training
    assert not any(m.training for m in teacher.modules())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(v, teacher.state_dict()[k]) for k, v in before.items())
    assert all(p.grad is not None for p in student.parameters())
    assert student.training


def test_a_teacher_of_another_stride_is_brought_to_the_students_size(batch: Batch) -> None:
    breakdown = distiller(Network(0, stride=4), Network(1, stride=2), "aicsd")(batch, step=1, total_steps=3)
    assert breakdown.anchor.shape[2:] == (4, 4)
    assert breakdown.terms["kd"] > 0


@pytest.mark.parametrize("method", ["aicsd", "at", "sp", "ickd"])
def test_a_teacher_that_sees_larger_pictures_than_the_student(method: str, batch: Batch) -> None:
    def loss(pictures: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(2)  # for ickd's adapter
        made = distiller(Network(0).eval(), Network(1, stride=8), method, teacher_scale=2)
        return made(Batch(pictures, batch.labels_BHW), step=1, total_steps=3).total

    fine = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    small = F.avg_pool2d(fine.float(), 2).round()
    seen: list[torch.Tensor] = []
    student = Network(0).eval()
    student.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    distiller(student, Network(1), method, teacher_scale=2)(Batch(fine, batch.labels_BHW), step=1, total_steps=3)
    assert torch.equal(seen[-1], small), "the student sees what a camera's frame becomes"
    blurred = small.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3).to(torch.uint8)  # the same to the student
    assert loss(fine) != loss(blurred), "the teacher sees the detail"


def test_ignored_pixels_count_in_no_term(batch: Batch) -> None:
    student, teacher = Network(0).eval(), Network(1).eval()
    nothing = Batch(batch.images_BCHW, torch.full_like(batch.labels_BHW, 255))
    breakdown = distiller(student, teacher, "aicsd")(nothing, step=1, total_steps=3)
    assert all(term == 0 for term in breakdown.terms.values())
    breakdown.total.backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in student.parameters())


def test_gradient_norms_are_those_of_the_weighted_terms(batch: Batch) -> None:
    breakdown = distiller(Network(0), Network(1), "kd", lambda_kd=5.0)(batch, step=1, total_steps=3)
    norms = breakdown.gradient_norms()
    (expected,) = torch.autograd.grad(5.0 * breakdown.terms["kd"], breakdown.anchor, retain_graph=True)
    assert norms["kd"] == pytest.approx(expected.norm().item(), rel=1e-5)
    assert norms["ce"] > 0


def test_labels_at_takes_the_nearest_pixel() -> None:
    labels = torch.arange(64).view(1, 8, 8)
    assert labels_at(labels, (2, 2)).tolist() == [[[18, 22], [50, 54]]]


def test_a_method_and_its_teacher_go_together() -> None:
    with pytest.raises(ValueError, match="needs a teacher"):
        distiller(Network(0), None, "aicsd")
    with pytest.raises(ValueError, match="takes no teacher"):
        distiller(Network(0), Network(1), "none")


def test_features_of_networks_of_other_strides_are_compared_at_the_backbone(batch: Batch) -> None:
    for method in ("at", "sp", "ickd"):
        student, teacher = Network(0, stride=4), Network(1, stride=2)
        loss = distiller(student, teacher, method)
        assert student.training, "looking at the features leaves the network as it was"
        breakdown = loss(batch, step=0, total_steps=2)
        breakdown.total.backward()
        assert breakdown.anchor.shape == (2, 8, 4, 4)
        adapters = dict(loss.state.named_parameters())
        assert set(adapters) == ({"adapter.weight"} if method == "ickd" else set())
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapters.values())


def test_features_of_a_teacher_whose_weights_are_in_low_precision(batch: Batch) -> None:
    settings = MethodConfig(method="ickd")
    teacher = lowered(Network(1), torch.bfloat16)
    loss = Distiller(Network(0), teacher, settings, image_size_hw=(16, 16), autocast=torch.bfloat16)
    assert torch.isfinite(loss(batch, step=0, total_steps=2).total)


def test_gradients_at_the_features_of_a_compiled_student_are_those_of_the_plain_one(batch: Batch) -> None:
    student = Network(0)
    student.head[0] = nn.Identity()  # dropout would draw otherwise
    loss = distiller(student, Network(1), "at")
    plain = loss(batch, step=0, total_steps=2).gradient_norms()
    student.compile(backend="aot_eager")
    assert loss(batch, step=0, total_steps=2).gradient_norms() == pytest.approx(plain, rel=1e-4)


def test_a_layer_is_found_by_name_and_a_wrong_name_is_said() -> None:
    loss = distiller(Network(0), Network(1), "sp", student_layer="backbone.0", teacher_layer="head.1")
    assert loss.names == ("sp",)
    with pytest.raises(InputError, match=r"no layer 'neck'.*Its outer parts: backbone.*head"):
        distiller(Network(0), Network(1), "sp", student_layer="neck")


@pytest.mark.parametrize("method", ["aicsd", "ickd"])
def test_balance_gives_each_term_the_wanted_share_of_the_gradient(method: str, batch: Batch) -> None:
    student, teacher = Network(0), Network(1)
    loss = distiller(student, teacher, method, balance=0.5, alw="off")
    for step in range(BALANCE_STEPS):
        first = loss(batch, step=step, total_steps=100)
        if step == 0:
            norms = first.gradient_norms()
            assert all(norms[n] == pytest.approx(0.5 * norms["ce"], rel=1e-4) for n in loss.names)
    later = loss(batch, step=BALANCE_STEPS, total_steps=100)
    resumed = distiller(student, teacher, method, balance=0.5, alw="off")
    resumed.state.load_state_dict(loss.state.state_dict())
    assert later.weights == resumed(batch, step=BALANCE_STEPS, total_steps=100).weights


def test_balance_is_the_same_for_a_step_in_parts(batch: Batch) -> None:
    labels = batch.labels_BHW.clone()
    labels[0, 8:] = 255  # so that the parts have gradients of other lengths
    batch = replace(batch, labels_BHW=labels)
    whole, parts = (distiller(Network(0).eval(), Network(1), "cwd", balance=0.5) for _ in range(2))
    whole(batch, step=0, total_steps=100)
    for part in batch.split(2):
        parts(part, step=0, total_steps=100)
    ratios = [loss.state.get_buffer("squares_cwd") / loss.state.get_buffer("squares_ce") for loss in (whole, parts)]
    torch.testing.assert_close(ratios[1], ratios[0])


def test_a_broken_step_leaves_the_balance_alone(batch: Batch) -> None:
    student, teacher = Network(0), Network(1)
    loss = distiller(student, teacher, "kd", balance=0.5)
    good = copy.deepcopy(teacher.state_dict())
    next(teacher.parameters()).data.fill_(float("nan"))
    loss(batch, step=0, total_steps=100)
    teacher.load_state_dict(good)
    norms = loss(batch, step=1, total_steps=100).gradient_norms()
    assert norms["kd"] == pytest.approx(0.5 * norms["ce"], rel=1e-4)


@pytest.mark.parametrize(
    ("method", "settings", "ce", "term"),
    [
        ("cwd", {"alw": "linear"}, 0.25, 0.75 * 3),
        ("icsd", {"alw": "linear"}, 0.25, 0.75 * 10),
        ("aicsd", {}, 0.25, 0.25 * 10),
        ("aicsd", {"alw_routing": "all-fade"}, 0.25, 0.75 * 10),
        ("aicsd", {"alw_routing": "kd-fades"}, 1, 10),
        ("aicsd", {"alw": "off"}, 1, 10),
        ("aicsd", {"alw": "quadratic"}, 0.0625, 0.625),
        ("aicsd", {"alw_start": 0.5}, 0.625, 6.25),
        ("aicsd", {"alw": "off", "icsd_warmup": 1.0}, 1, 4),
    ],
)
def test_alw_for_any_method(method: str, settings: dict[str, Any], ce: float, term: float, batch: Batch) -> None:
    loss = Distiller(Network(0), Network(1), MethodConfig(method=method, **settings), epochs=2)  # type: ignore[arg-type]
    weights = loss(batch, step=1, total_steps=5).weights
    assert weights["ce"] == pytest.approx(ce)
    assert weights[loss.names[-1]] == pytest.approx(term)


def test_alpha_stands_still_within_an_epoch_and_the_last_one_may_be_short(batch: Batch) -> None:
    loss = Distiller(Network(0), Network(1), MethodConfig(alw_per="epoch"), epochs=2)
    assert [loss(batch, step=step, total_steps=5).alpha for step in range(5)] == [0, 0, 0, 1, 1]
    assert loss(batch, step=0, total_steps=1).alpha == 1


def test_options_choose_which_pixels_and_classes_count(batch: Batch) -> None:
    student, teacher = Network(0).eval(), Network(1).eval()
    s, t = student(batch.images_BCHW), teacher(batch.images_BCHW)
    small = labels_at(batch.labels_BHW, (4, 4))
    labelled = small != 255

    def kd(**settings: Any) -> torch.Tensor:
        return distiller(student, teacher, "kd", **settings)(batch, step=0, total_steps=1).terms["kd"]

    torch.testing.assert_close(kd(mask_ignored=False), pixel_kd_loss(s, t))
    true = t.argmax(1) == small
    torch.testing.assert_close(kd(teacher_errors="mask"), pixel_kd_loss(s, t, valid=labelled, weight=true))
    unlabelled_too = true | ~labelled
    torch.testing.assert_close(
        kd(teacher_errors="mask", mask_ignored=False), pixel_kd_loss(s, t, weight=unlabelled_too)
    )
    right = t.softmax(1).gather(1, small.clamp(max=2).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(kd(teacher_errors="weigh"), pixel_kd_loss(s, t, valid=labelled, weight=right))
    everywhere = right.masked_fill(~labelled, 1)
    torch.testing.assert_close(kd(teacher_errors="weigh", mask_ignored=False), pixel_kd_loss(s, t, weight=everywhere))
    sure = t.softmax(1).amax(1) >= 0.45
    assert 0 < (sure & labelled).sum() < labelled.sum()
    torch.testing.assert_close(kd(teacher_confidence=0.45), pixel_kd_loss(s, t, valid=labelled, weight=sure))
    full = [torch.nn.functional.interpolate(z, size=(16, 16), mode="bilinear") for z in (s, t)]
    torch.testing.assert_close(kd(distill_size="full"), pixel_kd_loss(*full, valid=batch.labels_BHW != 255))
    ics = distiller(student, teacher, "icsd", icsd_classes="present", icsd_direction="symmetric", icsd_normalize="none")
    present = classes_present(t, small)
    expected = icsd_loss(s, t, valid=labelled, normalize="none", symmetric=True, classes=present)
    torch.testing.assert_close(ics(batch, step=0, total_steps=1).terms["icsd"], expected)


def test_classes_that_nobody_sees_are_left_out_of_icsd_on_request(batch: Batch) -> None:
    student, teacher = Network(0).eval(), Network(1).eval()
    last = [module for module in teacher.modules() if isinstance(module, torch.nn.Conv2d)][-1]
    assert last.bias is not None
    last.bias.data[2] = -100
    batch = replace(batch, labels_BHW=torch.where(batch.labels_BHW == 2, 1, batch.labels_BHW))
    s, t = student(batch.images_BCHW), teacher(batch.images_BCHW)
    labelled = labels_at(batch.labels_BHW, (4, 4)) != 255
    two = torch.tensor([True, True, False]).expand(len(s), 3)
    for choice, classes in (("all", None), ("present", two)):
        found = distiller(student, teacher, "icsd", icsd_classes=choice)(batch, step=0, total_steps=1).terms["icsd"]
        torch.testing.assert_close(found, icsd_loss(s, t, valid=labelled, classes=classes))


def test_cwd_has_its_papers_temperature_unless_one_is_given(batch: Batch) -> None:
    student, teacher = Network(0).eval(), Network(1).eval()
    s, t = student(batch.images_BCHW), teacher(batch.images_BCHW)
    labelled = labels_at(batch.labels_BHW, (4, 4)) != 255
    for settings, temperature in (({}, 4.0), ({"temperature": 2.0}, 2.0)):
        found = distiller(student, teacher, "cwd", **settings)(batch, step=0, total_steps=1).terms["cwd"]
        torch.testing.assert_close(found, cwd_loss(s, t, temperature=temperature, valid=labelled))


def test_classes_present_are_those_of_the_labels_and_of_the_logits() -> None:
    logits = torch.zeros(2, 4, 2, 2)
    logits[0, 2], logits[1, 0] = 1, 1
    labels = torch.tensor([[[255, 255], [255, 1]], [[255, 255], [255, 255]]])
    assert classes_present(logits, labels).tolist() == [[False, True, True, False], [True, False, False, False]]


def test_classes_that_the_teacher_does_not_know_are_left_out(batch: Batch) -> None:
    student, teacher = Network(0).eval(), Network(1).eval()
    s, t = (network(batch.images_BCHW)[:, [0, 2]] for network in (student, teacher))
    small = labels_at(batch.labels_BHW, (4, 4))
    for mask_ignored, counted in ((True, small != 255), (False, None)):
        settings = MethodConfig(method="kd", mask_ignored=mask_ignored)
        loss = Distiller(student, teacher, settings, known_classes=[0, 2])
        expected = pixel_kd_loss(s, t, valid=counted, weight=small != 1)
        torch.testing.assert_close(loss(batch, step=0, total_steps=1).terms["kd"], expected)
    batch = replace(batch, labels_BHW=torch.where(batch.labels_BHW == 2, 1, batch.labels_BHW))
    last = teacher.head[1]
    assert isinstance(last, nn.Conv2d)
    assert last.bias is not None
    last.bias.data[2] = -100  # so that nobody sees class 2
    s, t = (network(batch.images_BCHW)[:, [0, 2]] for network in (student, teacher))
    small = labels_at(batch.labels_BHW, (4, 4))
    present = torch.tensor([True, False]).expand(len(s), 2)
    expected = icsd_loss(s, t, valid=(small != 255) & (small != 1), normalize="none", classes=present)
    settings = MethodConfig(method="icsd", icsd_classes="present", icsd_normalize="none")
    loss = Distiller(student, teacher, settings, known_classes=[0, 2])
    found = loss(batch, step=0, total_steps=1).terms["icsd"]
    torch.testing.assert_close(found, expected)
    assert not torch.isclose(found, icsd_loss(s, t, valid=(small != 255) & (small != 1), normalize="none"))


@pytest.mark.parametrize(("name", "alone", "other"), [("alw", "linear", "cosine"), ("qat", "cpu", "tensorrt")])
def test_a_switch_as_a_flag_alone_and_as_yaml_reads_it(name: str, alone: str, other: str, tmp_path: Path) -> None:
    parser = Parser("x")
    add_config_flags(parser, DistillConfig)

    def read(*arguments: str) -> Any:
        return getattr(read_config(DistillConfig, parser.parse_args(arguments)), name)

    assert read("--method", "cwd", f"--{name}") == alone
    assert read(f"--{name}", other) == other
    for text, value in (("off", "off"), ("on", alone), (other, other)):
        (tmp_path / "c.yaml").write_text(f"{name}: {text}\n")
        assert read("--config", str(tmp_path / "c.yaml")) == value


def test_weighing_pixels_needs_a_term_that_has_them() -> None:
    with pytest.raises(InputError, match=r"cwd has none: use kd or aicsd$"):
        validated(DistillConfig, {"method": "cwd", "teacher_errors": "weigh"})
    assert validated(DistillConfig, {"method": "none", "teacher_errors": "weigh"}).method == "none"


def test_a_run_of_an_older_version_has_the_settings_of_then() -> None:
    defaults = {"qat": "off", "lr": 1e-3}
    check_same_run({"qat": "off", "lr": 0.1}, {"lr": 0.1}, folder=Path("x"), defaults=defaults)
    with pytest.raises(InputError, match="qat: was 'off', now 'cpu'"):
        check_same_run({"qat": "cpu", "lr": 0.1}, {"lr": 0.1}, folder=Path("x"), defaults=defaults)
