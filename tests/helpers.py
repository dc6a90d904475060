"""Small data and a small network, and commands run as a user does."""

from __future__ import annotations

import io
import json
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from aicsd_deploy.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from aicsd_deploy.data.spec import open_dataset
from aicsd_deploy.export.verify import frames_for_comparison
from aicsd_deploy.metadata import Metadata, SegClass
from aicsd_deploy.models import build_model
from aicsd_deploy.models.deploy import Normalize
from aicsd_deploy.runtime.frames import resize_image

REPO = Path(__file__).parents[1]
SHARED = REPO.parent / "shared"
COLORS = np.array([(200, 60, 40), (40, 160, 60), (50, 70, 190)], np.uint8)
SIZE_HW = (48, 64)
CLASSES = tuple(SegClass(name, (i, 2 * i, 3 * i)) for i, name in enumerate("abcde"))
TINY = ["--data", "folder:data", "--batch-size", 4, "--val-every", 4, "--threads", 1, "--warmup-steps", 2, "--lr", 0.02]
"""Settings of a training that takes seconds."""


NETWORK = """
from torch import nn

def tiny(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 16, 5, stride=4, padding=2), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(16, num_classes, 1)
    )
"""
"""Your own network, as a user would write it: it learns the blocks of `write_folder_dataset` in seconds."""

NETWORK_WITH_BACKBONE = """
from torch import nn

class Small(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 16, 5, stride=4, padding=2), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Conv2d(16, num_classes, 1))

    def forward(self, images):
        return self.head(self.backbone(images))

def small(num_classes):
    return Small(num_classes)
"""
"""The same with a part that is named as a backbone, for methods that compare features."""


def write_folder_dataset(root: Path, *, train: int = 12, val: int = 4, size_hw: tuple[int, int] = SIZE_HW) -> Path:
    """Write a `folder:` data set of blocks in three colours: a network learns it in a few steps."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for kind in ("images", "labels"):
            (root / split / kind).mkdir(parents=True)
        for i in range(count):
            blocks = rng.integers(0, 3, (3, 4), dtype=np.uint8)
            labels = np.kron(blocks, np.ones((size_hw[0] // 3, size_hw[1] // 4), np.uint8))
            noise = rng.integers(-25, 25, (*labels.shape, 3))
            image = np.clip(COLORS[labels] + noise, 0, 255).astype(np.uint8)
            labels[:2] = 255
            Image.fromarray(image).save(root / split / "images" / f"{i:03d}.png")
            Image.fromarray(labels).save(root / split / "labels" / f"{i:03d}.png")
    (root / "classes.txt").write_text("0 red 200 60 40\n1 green 40 160 60\n2 blue 50 70 190\n")
    return root


def log_lines(folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what the clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("speed", "step_ms")} for line in lines]


def call_script(script: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run one of the commands inside this process, which saves the seconds that importing torch takes; else as `run_script`."""
    from aicsd_deploy.recipes import listed, open_checked

    listed.cache_clear()  # both know data sets by paths relative to the working folder
    open_checked.cache_clear()
    path, out, err, code = str(REPO / script), io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setenv("AICSD_TRUST", "tiny_network:tiny,small_network:small")
        patch.syspath_prepend(str(cwd))
        patch.setattr(sys, "argv", [path, *map(str, arguments)])
        sys.modules.pop("tiny_network", None)
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return subprocess.CompletedProcess(sys.argv, code, out.getvalue(), err.getvalue())


def run_script(script: str, *arguments: object, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run one of the commands as a user does, with one thread."""
    return subprocess.run(
        [sys.executable, str(REPO / script), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", "AICSD_TRUST": "tiny_network:tiny"},
        check=False,
    )


def random_checkpoint(
    path: Path, model: str, size_hw: tuple[int, int] = (64, 96), classes: tuple[SegClass, ...] = CLASSES
) -> Checkpoint:
    """A network with random weights, but with statistics of batch normalisation and a use of all classes as a trained one."""
    torch.manual_seed(0)
    network = build_model(model, num_classes=len(classes))
    metadata = Metadata(model, classes, size_hw, data="synthetic")
    frames = frames_for_comparison(open_dataset("synthetic", "val"), count=8)
    pictures = torch.from_numpy(np.stack([resize_image(frame, size_hw) for frame in frames])).permute(0, 3, 1, 2)
    images = Normalize(metadata)(pictures)
    network.train()
    with torch.no_grad():
        for _ in range(30):
            network(images)
        # Every class is made to win somewhere, so that a wrong graph shows.
        last = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m.bias is not None][-1]
        last.bias -= network.eval()(images).mean(dim=(0, 2, 3))
    save_checkpoint(path, Checkpoint(metadata, network.state_dict()))
    return load_checkpoint(path)
