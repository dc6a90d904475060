"""On a GPU: two copies of a network under way at once, and the labels that one alone gives."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from aicsd_deploy.checkpoint import Checkpoint, save_checkpoint
from aicsd_deploy.data.spec import open_dataset
from aicsd_deploy.metadata import Metadata
from aicsd_deploy.models import build_model
from aicsd_deploy.runtime.base import UInt8Array, open_backend
from aicsd_deploy.video.overlay import Overlay
from aicsd_deploy.video.pipeline import process_video
from aicsd_deploy.video.sinks import Sink
from aicsd_deploy.video.sources import Frame, SyntheticSource

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that PyTorch can use"),
]


class KeepLabels(Sink):
    name, wants_overlay = "labels", False

    def __init__(self) -> None:
        self.labels: list[UInt8Array] = []

    def write(self, frame: Frame) -> bool:
        assert frame.labels is not None
        self.labels.append(frame.labels)
        return True


def test_two_copies_under_way_give_the_labels_of_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classes = open_dataset("synthetic", "val").classes
    network = build_model("lraspp_resnet18", num_classes=len(classes)).train()
    network(torch.randn(4, 3, 96, 128))
    save_checkpoint(
        tmp_path / "c.pt", Checkpoint(Metadata("lraspp_resnet18", classes, (96, 128)), network.state_dict())
    )
    found = []
    for count in (1, 2):
        backends = [open_backend(tmp_path / "c.pt", device="cuda") for _ in range(count)]
        sink = KeepLabels()
        source = SyntheticSource((192, 256), seconds=2)
        result = process_video(source, backends, sink, overlay=Overlay(classes))
        assert result.frames_out == 50
        found.append(np.stack(sink.labels))
    np.testing.assert_array_equal(found[0], found[1])
    print(f"{result.fps:.1f} fps", file=sys.stderr)
