"""Steps that break and memory that runs out: what is said, what is kept, how a run goes on."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, call_script, log_lines

import aicsd_deploy.distiller as distiller
from aicsd_deploy.config import TrainConfig
from aicsd_deploy.data.dataset import CachedDataset, LabelledImage
from aicsd_deploy.errors import AicsdError, InputError
from aicsd_deploy.recipes import train_teacher
from aicsd_deploy.trainer import Trainer

RUN = [*TINY, "--model", "tiny_network:tiny", "--epochs", 4, "--log-every", 1]
GOOD = distiller.cross_entropy


def breaks_at(monkeypatch: pytest.MonkeyPatch, *broken: int) -> None:
    """Let the cross-entropy of some calls be NaN."""
    calls = 0

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return GOOD(logits, labels) * (float("nan") if calls in broken else 1.0)

    monkeypatch.setattr(distiller, "cross_entropy", loss)


def test_a_broken_step_is_skipped_by_choice_and_its_batch_kept(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks_at(monkeypatch, 4)
    result = call_script("train/teacher.py", *RUN, "--on-broken-step", "skip", "--out", tmp_path / "r", cwd=trained)
    assert result.returncode == 0, result.stderr
    assert "skipped step 3: no longer a number: loss, gradient, ce" in result.stderr
    lines = log_lines(tmp_path / "r")
    assert [line["step"] for line in lines if "skipped" in line] == [4]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12]
    kept = torch.load(tmp_path / "r/broken-step-00000003.pt", weights_only=True)
    assert kept["images_BCHW"].shape == (4, 3, 48, 64)
    assert json.loads((tmp_path / "r/summary.json").read_text())["miou"] > 0


def test_a_run_that_only_breaks_is_stopped(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    breaks_at(monkeypatch, *range(2, 99))
    result = call_script("train/teacher.py", *RUN, "--on-broken-step", "skip", "--out", tmp_path / "r", cwd=trained)
    assert result.returncode == 2
    assert "broke at step 10" in result.stderr
    assert len(list((tmp_path / "r").glob("broken-step-*.pt"))) == 1


@pytest.mark.parametrize(("fits", "advice"), [(3, "2 fit: use --accumulate 2"), (1, "Not even 2 fit")])
def test_out_of_memory_is_answered_with_what_fits(
    fits: int, advice: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if len(logits) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return GOOD(logits, labels)

    monkeypatch.setattr(distiller, "cross_entropy", loss)
    result = call_script("train/teacher.py", *RUN, "--out", tmp_path / "r", cwd=trained)
    assert result.returncode == 2
    assert "Out of memory with 4 images of 48x64 at a time" in result.stderr
    assert advice in result.stderr


def test_a_run_that_is_stopped_while_it_looks_at_the_data_asks_to_be_started_again(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aicsd_deploy.recipes.check_dataset", lambda _data: os.kill(os.getpid(), signal.SIGTERM))
    result = call_script("train/teacher.py", *RUN, "--out", tmp_path / "r", cwd=trained)
    assert result.returncode == 75
    assert "stopped by SIGTERM" in result.stderr
    assert not (tmp_path / "r").exists()


def test_what_changed_since_a_run_was_saved_is_said(trained: Path) -> None:
    run = [*TINY, "--model", "tiny_network:tiny", "--epochs", 12, "--out", "runs/teacher", "--resume", "auto"]
    result = call_script("train/teacher.py", *run, "--workers", 1, "--log-every", 3, cwd=trained)
    assert result.returncode == 0, result.stderr
    assert "changed since this run was saved: log_every: was 20, now 3; workers: was 0, now 1" in result.stderr


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_vanishes_while_training_is_named_without_a_traceback(
    workers: int, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(multiprocessing.active_children())  # those of other tests

    def load(_self: CachedDataset, _index: int) -> LabelledImage:
        raise InputError("The image file 007.png does not exist.")

    monkeypatch.setattr("aicsd_deploy.recipes.Trainer.fit", vanishing(Trainer.fit, monkeypatch, load))
    result = call_script("train/teacher.py", *RUN, "--workers", workers, "--out", tmp_path / "r", cwd=trained)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "error: The image file 007.png does not exist."
    assert "Traceback" not in result.stderr
    assert set(multiprocessing.active_children()) <= before, "Python would wait for it for ever"


def test_no_worker_outlives_a_run_that_breaks(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(multiprocessing.active_children())
    breaks_at(monkeypatch, 4)
    monkeypatch.chdir(trained)
    monkeypatch.setenv("AICSD_TRUST", "tiny_network:tiny")
    config = TrainConfig(
        data="folder:data", model="tiny_network:tiny", batch_size=4, epochs=4, log_every=1, threads=1, workers=1
    )
    with pytest.raises(AicsdError, match="broke at step 3") as kept:  # and with it all that its frames refer to
        train_teacher(config, tmp_path / "r")
    assert set(multiprocessing.active_children()) <= before
    assert kept.tb is not None


def test_a_worker_that_is_killed_is_explained(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_self: CachedDataset, _index: int) -> LabelledImage:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    monkeypatch.setattr("aicsd_deploy.recipes.Trainer.fit", vanishing(Trainer.fit, monkeypatch, load))
    result = call_script("train/teacher.py", *RUN, "--workers", 1, "--out", tmp_path / "r", cwd=trained)
    assert result.returncode == 2
    assert re.search(r"error: A process of --workers died \(DataLoader worker .*\).*fewer --workers", result.stderr)


def vanishing(fit: Callable[[Trainer], None], patch: pytest.MonkeyPatch, load: Any) -> Callable[[Trainer], None]:
    """Return `Trainer.fit` with a data set that is whole when it is looked at, and later is not."""

    def changed(self: Trainer) -> None:
        patch.setattr(CachedDataset, "load", load)
        fit(self)

    return changed
