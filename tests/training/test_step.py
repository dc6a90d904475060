"""One optimiser step: cut into parts, in low precision, with a running mean, and when its loss breaks."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from aicsd_deploy.config import DistillConfig, MethodConfig
from aicsd_deploy.data.loader import Batch
from aicsd_deploy.distiller import Distiller, LossBreakdown
from aicsd_deploy.training import distributed
from aicsd_deploy.training.fake_quant import imitate_int8
from aicsd_deploy.training.guard import StepGuard
from aicsd_deploy.training.optimizer import build_optimizer, lr_share
from aicsd_deploy.training.precision import autocast_dtype, lowered
from aicsd_deploy.training.step import TrainStep

CPU = torch.device("cpu")


class Network(nn.Module):
    """Logits at a quarter of the size; normalised over groups, so that images do not depend on each other."""

    def __init__(self, seed: int, norm: type[nn.Module] = nn.GroupNorm) -> None:
        super().__init__()
        torch.manual_seed(seed)
        layer = nn.GroupNorm(2, 8) if norm is nn.GroupNorm else nn.BatchNorm2d(8)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 4, 4), layer, nn.ReLU(), nn.Conv2d(8, 3, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.layers(images.float() / 255)
        return logits


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (4, 16, 16), generator=generator)
    labels[0, :12] = 255
    labels[3] = 255
    return Batch(torch.randint(0, 256, (4, 3, 16, 16), generator=generator, dtype=torch.uint8), labels)


def step_of(network: nn.Module, *, known: list[int] | None = None, **settings: Any) -> TrainStep:
    config = DistillConfig(**{"lr": 0.01, "warmup_steps": 0, "batch_size": 4} | settings)
    dtype = autocast_dtype(config.precision, CPU)
    teacher = lowered(Network(9), dtype)
    method = MethodConfig(**config.model_dump(include=set(MethodConfig.model_fields)))
    distiller = Distiller(network, teacher, method, known_classes=known, autocast=dtype)
    return TrainStep(network, distiller, config, CPU, autocast=dtype)


@pytest.mark.parametrize("method_step", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [{}, {"teacher_errors": "mask"}, {"teacher_errors": "weigh"}, {"teacher_confidence": 0.4}, {"known": [0, 2]}],
    ids=str,
)
def test_a_step_in_parts_is_the_step_at_once(batch: Batch, method_step: int, settings: dict[str, Any]) -> None:
    whole, parts = Network(0), Network(0)
    logged = [
        step_of(network, accumulate=count, **settings)(batch, step=method_step, total=5, logs=True)
        for network, count in ((whole, 1), (parts, 2))
    ]
    assert logged[1]["loss"] == pytest.approx(logged[0]["loss"], rel=1e-5)
    assert logged[1]["terms"] == pytest.approx(logged[0]["terms"], rel=1e-5)
    assert logged[1]["gradient_norm"] == pytest.approx(logged[0]["gradient_norm"], rel=1e-4)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_is_close_and_the_losses_stay_in_float32(batch: Batch, precision: str) -> None:
    full, low = Network(0), Network(0)
    a = step_of(full)(batch, step=2, total=5, logs=True)
    taker = step_of(low, precision=precision)
    seen: list[torch.dtype] = []
    low.layers[3].register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    b = taker(batch, step=2, total=5, logs=True)
    assert seen == [torch.bfloat16 if precision == "bf16" else torch.float16]
    assert b["loss"] == pytest.approx(a["loss"], rel=0.03)
    assert b["loss"] != a["loss"]
    assert taker.loss(batch, step=2, total_steps=5).anchor.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in low.parameters())


def test_auto_precision_is_float32_on_the_cpu_and_a_lowered_teacher_keeps_its_normalisation() -> None:
    assert autocast_dtype("auto", CPU) is None
    teacher = lowered(Network(0, nn.BatchNorm2d), torch.bfloat16)
    assert {p.dtype for p in teacher.layers[0].parameters()} == {torch.bfloat16}  # type: ignore[index, union-attr]
    assert {p.dtype for p in teacher.layers[1].parameters()} == {torch.float32}  # type: ignore[index, union-attr]


def test_the_running_mean_follows_the_weights_and_forgets_the_first_ones_fast(batch: Batch) -> None:
    network = Network(0)
    taker = step_of(network, ema=0.2)
    expected = network.layers[0].weight.detach().clone()
    for step, decay in enumerate((1 / 10, 2 / 11, 0.2, 0.2)):
        taker(batch, step=step, total=5, logs=False)
        expected = decay * expected + (1 - decay) * network.layers[0].weight.detach()
    torch.testing.assert_close(taker.validated_network.layers[0].weight.data, expected)


class Breaking:
    """A loss that breaks at one step, in one of several ways."""

    def __init__(self, loss: Any, how: str, at: int) -> None:
        self.loss, self.how, self.at = loss, how, at
        self.student, self.state, self.phase = loss.student, loss.state, loss.phase

    def __call__(self, batch: Batch, *, step: int, total_steps: int) -> LossBreakdown:
        found = self.loss(batch, step=step, total_steps=total_steps)
        if step != self.at:
            return found
        if self.how == "gradient":
            found.total.register_hook(lambda gradient: gradient * float("nan"))
            return found
        factor = {"nan": float("nan"), "exploded": 1e6}[self.how]
        spoilt = {"nan": "icsd", "exploded": "ce"}[self.how]
        terms = found.terms | {spoilt: found.terms[spoilt] * factor}
        return LossBreakdown(found.total * factor, terms, found.weights, found.anchor, found.alpha)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("how", ["nan", "gradient", "exploded"])
def test_a_broken_step_changes_nothing_and_is_named(batch: Batch, how: str, optimizer: str) -> None:
    network = Network(0, nn.BatchNorm2d)
    taker = step_of(network, optimizer=optimizer)
    taker.loss = Breaking(taker.loss, how, at=2)
    for step in (0, 1):
        taker(batch, step=step, total=9, logs=False)
    before = copy.deepcopy(network.state_dict()), copy.deepcopy(taker.optimizer.state_dict())
    taker(batch, step=2, total=9, logs=False)
    counter = "layers.1.num_batches_tracked"
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in before[0].items() if k != counter)
    for index, state in before[1]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, taker.optimizer.state_dict()["state"][index][name]), name
    (broken,) = taker.guard.broken_steps()
    assert broken.step == 2
    said = {"nan": "no longer a number: loss, gradient, icsd", "gradient": "no longer a number: gradient", "exploded": "exploded"}  # fmt: skip
    assert said[how] in str(broken)
    taker(batch, step=3, total=9, logs=False)
    assert taker.guard.broken_steps() == []
    assert not torch.equal(before[0]["layers.0.weight"], network.state_dict()["layers.0.weight"])


def test_a_broken_first_step_leaves_no_momentum(batch: Batch) -> None:
    networks = [Network(0), Network(0)]
    takers = [step_of(network, optimizer="sgd") for network in networks]
    takers[0].loss = Breaking(takers[0].loss, "nan", at=0)
    takers[0](batch, step=0, total=9, logs=False)
    for taker in takers:
        taker(batch, step=1, total=9, logs=False)
    for broken, fresh in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        assert torch.equal(broken, fresh)


@pytest.mark.parametrize(
    "losses",
    [
        pytest.param((0.0, 23.0, 0.0, 22.0, 9000.0), id="steps without labels are no measure"),
        pytest.param((0.002, 0.003, 0.9, 4.0, 30.0), id="an odd batch of a network that knows its images"),
    ],
)
def test_what_explodes_is_the_last_of_these_and_no_other(losses: tuple[float, ...]) -> None:
    guard = StepGuard(Network(0), CPU)
    skipped = []
    for step, ce in enumerate(losses):
        guard.before()
        values = {"loss": torch.tensor(ce), "gradient": torch.tensor(1.0), "ce": torch.tensor(ce)}
        skipped.append(bool(guard.judge(step, values, scaled=False)))
    assert skipped == [False, False, False, False, True]


def test_a_cross_entropy_of_a_hundred_times_its_running_mean_has_exploded_and_no_other_loss() -> None:
    guard = StepGuard(Network(0), CPU)

    def skips(ce: float) -> bool:
        guard.before()
        values = {"loss": torch.tensor(1e9), "gradient": torch.tensor(1.0), "ce": torch.tensor(ce)}
        return bool(guard.judge(0, values, scaled=False))

    assert not skips(1.0)
    assert not skips(2.0)
    assert guard.state_dict() == {"mean": pytest.approx(0.98 * 1 + 0.02 * 2)}
    assert skips(102.1)
    assert not skips(101.9)


def test_a_gradient_beyond_float16_is_left_out_and_nothing_is_broken() -> None:
    guard = StepGuard(Network(0), CPU)
    values = {"loss": torch.tensor(1.0), "gradient": torch.tensor(torch.inf), "ce": torch.tensor(1.0)}
    for scaled, broken in ((True, []), (False, [1])):
        guard.before()
        assert guard.judge(len(broken), values, scaled=scaled) == 1
        assert [step.step for step in guard.broken_steps()] == broken


def test_an_overflow_of_another_process_halves_the_scale_in_this_one_too(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Network(0)
    taker = step_of(network, precision="fp16")
    taker(batch, step=0, total=9, logs=False)
    before = taker.scaler.get_scale()
    monkeypatch.setattr(distributed, "average_gradients", lambda _: network.layers[3].weight.grad.fill_(torch.inf))
    taker(batch, step=1, total=9, logs=False)
    assert taker.scaler.get_scale() == before / 2


def test_the_backbone_learns_more_slowly_and_biases_do_not_decay() -> None:
    network = nn.Module()
    network.backbone, network.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
    config = DistillConfig(lr=0.01, backbone_lr_factor=0.1, weight_decay=0.5)
    groups = build_optimizer(network, config, besides=nn.Module()).param_groups
    found = {id(p): (group["base_lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert [found[id(p)] for p in network.parameters()] == [(0.001, 0.5), (0.001, 0.0), (0.01, 0.5), (0.01, 0.0)]


def test_the_optimiser_is_the_one_asked_for_and_a_pretrained_backbone_learns_at_a_tenth() -> None:
    network = nn.Module()
    network.backbone, network.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
    for name, kind, weights, factor in (
        ("sgd", torch.optim.SGD, Path("w.pth"), 0.1),
        ("adamw", torch.optim.AdamW, None, 1),
    ):
        config = DistillConfig(lr=0.01, optimizer=name, backbone_weights=weights)
        optimizer = build_optimizer(network, config, besides=nn.Module())
        assert type(optimizer) is kind
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01 * factor] * 2 + [0.01] * 2)


def test_sgd_takes_the_steps_of_the_papers_recipe() -> None:
    """Velocity 0.9 v + g + decay w, and the weight less the learning rate times that."""
    network = nn.Conv2d(1, 1, 1, bias=False)
    optimizer = build_optimizer(network, DistillConfig(optimizer="sgd", lr=0.1, weight_decay=0.5), besides=nn.Module())
    weight, velocity = network.weight.item(), 0.0
    for gradient in (1.0, 3.0):
        network.weight.grad = torch.full_like(network.weight, gradient)
        optimizer.step()
        velocity = 0.9 * velocity + gradient + 0.5 * weight
        weight -= 0.1 * velocity
    assert network.weight.item() == pytest.approx(weight)


def test_the_learning_rate_rises_and_then_falls_as_in_the_papers() -> None:
    shares = [lr_share(step, 20, 4) for step in (0, 1, 3, 10, 18)]
    assert shares == pytest.approx([0.25, 0.5 * 0.95**0.9, 0.85**0.9, 0.5**0.9, 0.1**0.9])
    assert lr_share(0, 10, 0) == 1
    assert [lr_share(step, 10, 50) for step in (0, 1)] == pytest.approx([0.5, 0.9**0.9]), "at most a fifth of all"


def test_the_state_of_a_step_survives_a_file(batch: Batch, tmp_path: Any) -> None:
    whole, resumed = Network(0), Network(5)
    takers = [step_of(network, ema=0.9, precision="fp16") for network in (whole, resumed)]
    for step in range(3):
        takers[0](batch, step=step, total=9, logs=False)
    torch.save([whole.state_dict(), takers[0].state_dict()], tmp_path / "s.pt")
    network_state, taker_state = torch.load(tmp_path / "s.pt", weights_only=True)
    resumed.load_state_dict(network_state)
    takers[1].load_state_dict(taker_state)
    for taker in takers:
        taker(batch, step=3, total=9, logs=False)
    for a, b in ((whole, resumed), (takers[0].validated_network, takers[1].validated_network)):
        assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert takers[0].scaler.state_dict() == takers[1].scaler.state_dict()
    assert takers[0].guard.state_dict() == takers[1].guard.state_dict()


def test_a_state_without_a_scale_goes_on_in_float16(batch: Batch) -> None:
    began, resumed = step_of(Network(0)), step_of(Network(0), precision="fp16")
    began(batch, step=0, total=9, logs=False)
    resumed.load_state_dict(began.state_dict())
    resumed(batch, step=1, total=9, logs=False)
    assert resumed.scaler.get_scale() > 1


def test_the_running_mean_gets_its_ranges_of_int8_back(batch: Batch) -> None:
    takers = []
    for seed in (0, 5):
        network = Network(seed)
        ranges = imitate_int8(network, symmetric=False)
        takers.append(step_of(network, ema=0.9))
        for name, low_high in ranges.items():
            takers[-1].loss.state.register_buffer(name, low_high)
    for step in range(3):
        takers[0](batch, step=step, total=9, logs=False)
    takers[1].network.load_state_dict(takers[0].network.state_dict())
    takers[1].load_state_dict(takers[0].state_dict())
    with torch.no_grad():
        first, second = (taker.validated_network.eval()(batch.images_BCHW) for taker in takers)
    assert first.std() > 0
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        *((method, {}) for method in ("none", "kd", "icsd", "aicsd", "cwd", "dist", "at", "sp", "ickd")),
        ("kd", {"teacher_errors": "weigh", "teacher_confidence": 0.5}),
        ("aicsd", {"teacher_errors": "mask", "icsd_classes": "present", "distill_size": "full"}),
    ],
)
def test_a_step_asks_for_no_value(method: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """On PyTorch's device without data, what would make a GPU wait, or mix it with the CPU, is an error.

    That device has no autocast and no fused optimiser, so they are left out.
    """
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    with torch.device("meta"):
        student, teacher = Network(0, nn.BatchNorm2d), Network(1)
        images, labels = torch.empty(4, 3, 16, 16, dtype=torch.uint8), torch.empty(4, 16, 16, dtype=torch.long)
    layers = {"student_layer": "layers.0", "teacher_layer": "layers.0"}
    about = MethodConfig(method=method, **layers, **settings)
    loss = Distiller(student, None if method == "none" else teacher, about, image_size_hw=(16, 16))
    config = DistillConfig(accumulate=2, ema=0.9, batch_size=4)
    taker = TrainStep(student, loss, config, torch.device("meta"), autocast=None)
    monkeypatch.setattr(taker.optimizer, "step", lambda: None)
    taker(Batch(images, labels), step=1, total=9, logs=False)
