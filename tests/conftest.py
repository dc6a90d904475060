"""Small data, a small trained network, and the reference material that only some machines have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

REPO = Path(__file__).parents[1]
SHARED = REPO.parent / "shared"
COLORS = np.array([(200, 60, 40), (40, 160, 60), (50, 70, 190)], np.uint8)
SIZE_HW = (48, 64)
TINY = ["--data", "folder:data", "--batch-size", 4, "--val-every", 4, "--threads", 1, "--warmup-steps", 2, "--lr", 0.02]
"""Settings of a training that takes seconds."""

torch.set_num_threads(1)


NETWORK = """
from torch import nn

def tiny(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 16, 5, stride=4, padding=2), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(16, num_classes, 1)
    )
"""
"""Your own network, as a user would write it: it learns the blocks of `write_folder_dataset` in seconds."""


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


@pytest.fixture
def folder_data(tmp_path: Path) -> Path:
    return write_folder_dataset(tmp_path / "data")


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the reference material in ../shared is not on this machine")
    return SHARED


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with data/, runs/teacher and runs/student (AICSD), both trained by the commands, and student.onnx."""
    work = tmp_path_factory.mktemp("trained")
    write_folder_dataset(work / "data")
    (work / "tiny_network.py").write_text(NETWORK)
    for script, arguments in (
        ("train/teacher.py", [*TINY, "--model", "tiny_network:tiny", "--epochs", 12, "--out", "runs/teacher"]),
        ("train/distill.py", [*TINY, "--student", "tiny_network:tiny", "--epochs", 8, "--out", "runs/student"]),
        ("export/to_onnx.py", []),
    ):
        result = run_script(script, *arguments, cwd=work)
        assert result.returncode == 0, result.stderr
    return work
