"""On a GPU: stages by CUDA events, the measured peak, power and energy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from aicsd_deploy.bench.gpu_meter import GpuMeter
from aicsd_deploy.bench.peak import measure_peak
from aicsd_deploy.bench.throughput import measure_throughput
from aicsd_deploy.checkpoint import Checkpoint, save_checkpoint
from aicsd_deploy.data.spec import open_dataset
from aicsd_deploy.metadata import Metadata
from aicsd_deploy.models import build_model
from aicsd_deploy.runtime.base import STAGES, open_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that PyTorch can use"),
]


def test_a_frame_is_followed_through_its_stages_and_its_energy_is_counted(tmp_path: Path) -> None:
    classes = open_dataset("synthetic", "val").classes
    network = build_model("lraspp_resnet18", num_classes=len(classes))
    metadata = Metadata("lraspp_resnet18", classes, (256, 512))
    save_checkpoint(tmp_path / "c.pt", Checkpoint(metadata, network.state_dict()))
    frames = [np.full((1, 256, 512, 3), i, np.uint8) for i in range(4)]
    with open_backend(tmp_path / "c.pt", device="cuda") as backend:
        stages = backend.time_stages(frames)
        assert tuple(stages) == STAGES
        assert all(milliseconds > 0 for milliseconds in stages.values())
        found = measure_throughput(backend, frames)
    assert found.best_fps >= found.fps_by_batch[1]
    if GpuMeter.of("cuda:0") is not None:
        assert found.gpu is not None
        assert 10 < found.gpu.power_w < 2000
        assert found.gpu.energy_mj_per_frame > 0


def test_the_peak_is_that_of_a_gpu() -> None:
    peak = measure_peak("cuda:0")
    assert peak is not None
    assert peak.gflops > 1000
    assert peak.bandwidth_gbs > 50
