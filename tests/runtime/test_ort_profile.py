"""Operators, as ONNX Runtime's profiler lists them, added up to stages."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from aicsd_deploy.runtime.base import open_backend
from aicsd_deploy.runtime.operators import stages


def test_the_network_goes_from_the_first_to_the_last_convolution() -> None:
    run = [
        ("MemcpyFromHost", 0.5),
        ("Cast", 1.0),
        ("FusedConv", 10.0),
        ("Resize", 2.0),
        ("QLinearConv", 20.0),
        ("ArgMax", 3.0),
        ("MemcpyToHost", 0.25),
    ]
    assert stages(run) == {
        "host_to_device": 0.5,
        "preprocessing": 1.0,
        "network": 32.0,
        "postprocessing": 3.0,
        "device_to_host": 0.25,
    }
    assert stages([("Cast", 1.0)]) == {}, "no convolution: nobody can tell"


@pytest.mark.parametrize("name", ["best.pt", "student.onnx"])
def test_the_stages_of_a_frame_are_told(name: str, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AICSD_TRUST", "tiny_network:tiny")
    monkeypatch.chdir(trained)
    monkeypatch.syspath_prepend(trained)
    monkeypatch.delitem(sys.modules, "tiny_network", raising=False)
    frames = [np.full((1, 48, 64, 3), i, np.uint8) for i in range(4)]
    with open_backend(f"runs/student/{name}", device="cpu", threads=1) as backend:
        found = backend.time_stages(frames)
        assert set(found) == {"preprocessing", "network", "postprocessing"}
        assert all(milliseconds > 0 for milliseconds in found.values())
        assert backend.infer(frames[0]).shape == (1, 48, 64), "it still runs"
        if name == "student.onnx":
            backend.device = "cuda:0"  # where the profiler sees launches only
            assert backend.time_stages(frames) == {}
