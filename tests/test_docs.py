"""What the documentation shows, run as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
from helpers import REPO

BLOCKS = re.findall(r"^```python\n(.*?)^```$", (REPO / "docs/library.md").read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=["run", "without_the_toolkit", "losses"])
def test_code_of_the_library_page_runs(block: str, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "student.onnx").symlink_to(trained / "runs/student/student.onnx")
    cv2.imwrite(str(tmp_path / "frame.png"), cv2.imread(str(next((trained / "data/val/images").iterdir()))))
    result = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(REPO)}
    )
    assert result.returncode == 0, result.stderr
    if "overlay.png" in block:
        assert (tmp_path / "overlay.png").is_file()
