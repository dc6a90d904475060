"""Two processes train as one does: same losses, same scores, one writer; and stop together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import REPO, TINY, call_script, log_lines, write_folder_dataset
from two_processes import adapter_and_weight

from aicsd_deploy.data.spec import open_dataset
from aicsd_deploy.evaluate import evaluate
from aicsd_deploy.runtime.base import open_backend

# Without batch normalisation and dropout: what one process computes with them depends on which images it has at once.
NETWORK = """
from torch import nn

def tiny(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 16, 5, stride=4, padding=2), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, num_classes, 1)
    )

def with_statistics(num_classes):
    return nn.Sequential(nn.Conv2d(3, 8, 5, stride=4, padding=2), nn.BatchNorm2d(8), nn.Conv2d(8, num_classes, 1))
"""
RUN = [*TINY, "--student", "tiny_network:tiny", "--teacher", "teacher/best.pt", "--epochs", 8, "--log-every", 1, "--scale", 0.5, 1.5]  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a teacher, runs `one` (one process) and `two` (two), and `asked`, which was asked to stop."""
    work = tmp_path_factory.mktemp("two")
    write_folder_dataset(work / "data", val=5)
    (work / "tiny_network.py").write_text(NETWORK)
    teacher = [*TINY, "--model", "tiny_network:tiny", "--epochs", 4, "--out", "teacher"]
    for script, arguments in (("teacher", teacher), ("distill", [*RUN, "--out", "one"])):
        result = call_script(f"train/{script}.py", *arguments, cwd=work)
        assert result.returncode == 0, result.stderr
    program = [str(REPO / "tests/training/two_processes.py"), str(REPO / "train/distill.py"), *map(str, RUN)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    both = subprocess.run(
        [*torchrun, *program],
        cwd=work,
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "AICSD_TRUST": "tiny_network:tiny",
            "PYTHONPATH": f"{REPO}{os.pathsep}{work}",
        },
        check=False,
    )
    assert both.returncode == 0, both.stderr
    assert both.stderr.count("going on from") == 0
    assert both.stderr.count("device: cpu, threads: 1, 2 processes") == 3, "once a run: only one process speaks"
    return work


def rank(work: Path, number: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((work / f"rank{number}.json").read_text())
    return found


def test_two_processes_give_the_losses_of_one(work: Path) -> None:
    one, two = ([line for line in log_lines(work / run) if "loss" in line] for run in ("one", "two"))
    assert [line["step"] for line in two] == list(range(1, 25))
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["terms"] == pytest.approx(a["terms"], rel=1e-4, abs=1e-7)
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-3, abs=1e-7)
    weights = [torch.load(work / run / "last.pt", weights_only=True)["model"] for run in ("one", "two")]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-4)


def test_an_adapter_and_balance_are_those_of_one_process(work: Path) -> None:
    one = pytest.approx(adapter_and_weight(), rel=1e-4, abs=1e-6)
    assert rank(work, 0)["adapter"] == one
    assert rank(work, 1)["adapter"] == one


def test_validation_of_two_processes_counts_every_image_once(work: Path) -> None:
    with open_backend(work / "one/best.pt", device="cpu") as backend:
        matrix = evaluate(backend, open_dataset(f"folder:{work / 'data'}", "val"))
    assert rank(work, 0)["counts"] == rank(work, 1)["counts"] == matrix.counts.tolist()
    summaries = [json.loads((work / run / "summary.json").read_text()) for run in ("one", "two")]
    assert summaries[0]["images"] == summaries[1]["images"] == 5
    assert summaries[0]["teacher"] == summaries[1]["teacher"]


def test_what_is_validated_are_the_statistics_that_are_saved(work: Path) -> None:
    saved = torch.load(work / "statistics/last.pt", weights_only=True)["model"]["1.running_mean"]
    for number in (0, 1):
        torch.testing.assert_close(torch.tensor(rank(work, number)["scored"]), saved, msg=f"process {number}")


def test_a_process_that_is_asked_to_stop_stops_all_and_one_process_can_go_on(work: Path) -> None:
    assert rank(work, 0)["codes"] == rank(work, 1)["codes"] == [0, 75]
    assert torch.load(work / "asked/last.pt", weights_only=True)["training"]["step"] == 8, (
        "asked in its seventh step, the process passes it on in the next"
    )
    result = call_script("train/distill.py", *RUN, "--out", "asked", "--resume", "auto", cwd=work)
    assert result.returncode == 0, result.stderr
    one, asked = ([line["loss"] for line in log_lines(work / run) if "loss" in line] for run in ("one", "asked"))
    assert asked == pytest.approx(one, rel=1e-3)


def test_a_batch_that_cannot_be_shared_out_is_refused(work: Path) -> None:
    result = call_script("train/distill.py", *RUN, "--accumulate", 3, "--out", "odd", cwd=work)
    assert result.returncode == 2
    assert "3 parts" in result.stderr
