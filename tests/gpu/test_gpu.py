"""On a GPU: the same labels as on the CPU, and a training that runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aicsd_deploy.checkpoint import Checkpoint, save_checkpoint
from aicsd_deploy.config import MethodConfig, TrainConfig
from aicsd_deploy.data.loader import Batch
from aicsd_deploy.data.spec import open_dataset
from aicsd_deploy.distiller import Distiller
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


@pytest.mark.parametrize("method", ["kd", "icsd", "aicsd", "cwd", "dist", "at", "sp", "ickd"])
def test_no_method_makes_the_gpu_wait_and_autocast_changes_no_loss(method: str) -> None:
    torch.manual_seed(0)
    student, teacher = (build_model("lraspp_resnet18", num_classes=5).cuda() for _ in range(2))
    loss = Distiller(FromBytes(student), FromBytes(teacher), MethodConfig(method=method, icsd_classes="present"))  # type: ignore[arg-type]
    labels = torch.randint(0, 5, (4, 64, 64)).cuda()
    batch = Batch(torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8).cuda(), labels)
    student.eval()
    plain = loss(batch, step=1, total_steps=3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            inside = loss(batch, step=1, total_steps=3)
        inside.total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, term in plain.terms.items():
        torch.testing.assert_close(inside.terms[name], term, rtol=0.1, atol=1e-3)


class FromBytes(torch.nn.Module):
    """Takes uint8 images, as `Distiller` gives them."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(images.float() / 255)
        return logits


def test_training_runs_on_the_gpu(tmp_path: Path) -> None:
    config = TrainConfig(model="lraspp_resnet18", image_size=(96, 128), epochs=1, device="cuda")
    assert train_teacher(config, tmp_path / "run")["miou"] > 0.1
