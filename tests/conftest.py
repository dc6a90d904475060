"""Small data, a small trained network, and the reference material that only some machines have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import NETWORK, SHARED, TINY, call_script, write_folder_dataset

torch.set_num_threads(1)


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
        result = call_script(script, *arguments, cwd=work)
        assert result.returncode == 0, result.stderr
    return work
