"""On a GPU: the same labels as on the CPU, and a training that runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aicsd_deploy.checkpoint import Checkpoint, save_checkpoint
from aicsd_deploy.config import TrainConfig
from aicsd_deploy.data.spec import open_dataset
from aicsd_deploy.export.verify import compare, frames_for_comparison
from aicsd_deploy.metadata import Metadata
from aicsd_deploy.models import build_model
from aicsd_deploy.recipes import train_teacher
from aicsd_deploy.runtime.base import open_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that PyTorch can use"),
]


def test_torch_on_the_gpu_labels_as_on_the_cpu(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dataset = open_dataset("synthetic", "val")
    network = build_model("lraspp_resnet18", num_classes=len(dataset.classes)).train()
    network(torch.randn(4, 3, 96, 128))
    save_checkpoint(
        tmp_path / "c.pt", Checkpoint(Metadata("lraspp_resnet18", dataset.classes, (96, 128)), network.state_dict())
    )
    with open_backend(tmp_path / "c.pt", device="cpu") as cpu, open_backend(tmp_path / "c.pt", device="cuda") as gpu:
        assert gpu.device == "cuda:0"
        assert compare(cpu, gpu, frames_for_comparison(dataset, count=4)).share >= 0.995


def test_training_runs_on_the_gpu(tmp_path: Path) -> None:
    config = TrainConfig(model="lraspp_resnet18", image_size=(96, 128), epochs=1, device="cuda")
    assert train_teacher(config, tmp_path / "run")["miou"] > 0.1
