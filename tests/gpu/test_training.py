"""Training on a GPU: no waiting in a step, low precision, broken steps, memory, compilation."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from aicsd_deploy.config import DistillConfig, MethodConfig, TrainConfig
from aicsd_deploy.data.loader import Batch
from aicsd_deploy.data.transforms import Augmentation
from aicsd_deploy.distiller import Distiller
from aicsd_deploy.errors import AicsdError
from aicsd_deploy.models import build_model
from aicsd_deploy.recipes import train_teacher
from aicsd_deploy.training.precision import autocast_dtype, lowered
from aicsd_deploy.training.step import TrainStep
from aicsd_deploy.training.trouble import memory_explained

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that PyTorch can use"),
]
GPU = torch.device("cuda", 0)


class Scaled(nn.Module):
    """A network that takes uint8 images."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = build_model(name, num_classes=5).to(GPU, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(images.float() / 255)
        return logits


def step_of(student: nn.Module, **settings: object) -> TrainStep:
    config = DistillConfig(**{"batch_size": 4, "warmup_steps": 0} | settings)  # type: ignore[arg-type]
    dtype = autocast_dtype(config.precision, GPU)
    loss = Distiller(student, lowered(Scaled("lraspp_resnet50"), dtype), MethodConfig(method="aicsd"), autocast=dtype)
    return TrainStep(student, loss, config, GPU, autocast=dtype)


def batch(images: int = 4, side: int = 64) -> Batch:
    generator = torch.Generator().manual_seed(0)
    shape = (images, side, side)
    pictures = torch.randint(0, 256, (images, 3, side, side), generator=generator, dtype=torch.uint8)
    return Batch(pictures, torch.randint(0, 5, shape, generator=generator, dtype=torch.uint8)).pin_memory()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_does_not_wait_for_the_gpu(precision: str) -> None:
    taker = step_of(Scaled("lraspp_resnet18"), precision=precision, ema=0.99, accumulate=2)
    taker(batch().to(GPU), step=0, total=9, logs=False)  # the first sets things up
    torch.cuda.set_sync_debug_mode("error")
    try:
        taker(batch().to(GPU), step=1, total=9, logs=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert taker.guard.broken_steps() == []


def test_colours_are_those_of_the_cpu_and_nothing_is_waited_for() -> None:
    images, augmentation = batch().images_BCHW, Augmentation((64, 64))
    uploaded = images.to(GPU)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = augmentation.recolor(uploaded, seeds=[1, 2, 3, 4])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    difference = ours.cpu().int() - augmentation.recolor(images, seeds=[1, 2, 3, 4]).int()
    assert difference.abs().max() <= 2, "roundings of three changes"


def test_low_precision_gives_about_the_losses_of_float32() -> None:
    losses = {}
    for precision in ("fp32", "bf16", "fp16"):
        taker = step_of(Scaled("lraspp_resnet18"), precision=precision)
        losses[precision] = [taker(batch().to(GPU), step=s, total=20, logs=True)["loss"] for s in range(10)]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.1)
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=0.1)


def test_a_broken_step_changes_nothing() -> None:
    student = Scaled("lraspp_resnet18")
    taker = step_of(student)
    taker(batch().to(GPU), step=0, total=9, logs=False)
    before = copy.deepcopy(student.state_dict())
    good = taker.loss.student
    taker.loss.student = nn.Sequential(student, _Spoils())
    taker(batch().to(GPU), step=1, total=9, logs=False)
    taker.loss.student = good
    assert [broken.step for broken in taker.guard.broken_steps()] == [1]
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items() if "num_batches" not in k)


class _Spoils(nn.Module):
    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits * float("nan")


def test_out_of_memory_names_a_batch_size_that_fits() -> None:
    taker = step_of(Scaled("lraspp_resnet50"), batch_size=64)
    # A picture takes some 0.6 GiB: 64 do not fit, a few do.
    room = torch.cuda.memory_allocated() + 6 * 2**30
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        big = batch(64, 1024).to(GPU)
        with (
            pytest.raises(AicsdError, match=r"fit: use --accumulate \d+"),
            memory_explained(taker.loss, big, taker.config),
        ):
            taker(big, step=0, total=9, logs=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_compiled_run_with_workers_and_a_log_of_phases(tmp_path: Path) -> None:
    config = TrainConfig(model="lraspp_resnet18", image_size=(96, 128), epochs=1, workers=4, compile=True, profile=True, device="cuda")  # fmt: skip
    assert train_teacher(config, tmp_path / "run")["miou"] > 0.1
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(line["step_ms"]["student"] > 0 for line in lines if "step_ms" in line)
    assert (tmp_path / "run/profile.json").stat().st_size > 0
