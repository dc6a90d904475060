"""What the log says about time, and the trace of a few steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import REPO, TINY, call_script

from aicsd_deploy.training import timing
from aicsd_deploy.training.timing import StepClock


def test_phases_and_waiting_add_up_to_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(timing.time, "monotonic", lambda: now)

    def batches() -> object:
        nonlocal now
        for _ in range(4):
            now += 1.0
            yield None

    clock = StepClock(torch.device("cpu"))
    for _ in clock.waiting_for(batches()):  # type: ignore[arg-type]
        with clock.phase("student"):
            now += 2.0
        with clock.phase("student"):
            now += 0.5
        with clock.phase("losses"):
            now += 0.5
    read = clock.read(batch_size=8, steps_left=10)
    assert read["step_ms"] == {"data": 1000, "student": 2500, "losses": 500}
    assert read["speed"]["images_per_s"] == 2.0
    assert read["speed"]["data_share"] == 0.25
    assert read["speed"]["eta_s"] == 40
    assert read["speed"]["peak_memory_gib"] > 0.01
    now += 7
    clock.restart()
    for _ in clock.waiting_for(batches()):  # type: ignore[arg-type]
        now += 1.0
    assert clock.read(batch_size=8, steps_left=0)["speed"]["images_per_s"] == 4.0


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is inherited on Linux")
def test_the_peak_is_that_of_the_process_and_not_of_its_parent() -> None:
    child = "from aicsd_deploy.memory import peak_resident_bytes; print(peak_resident_bytes())"
    parent = (
        f"large = b'1' * 2**28; import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    )
    answer = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True, cwd=REPO)
    assert 2**22 < int(answer.stdout) < 2**27


@pytest.mark.parametrize(
    ("steps", "recorded"), [(0, None), (1, 1), (2, 1), (3, 1), (5, 2), (20, timing.PROFILED_STEPS)]
)
@pytest.mark.filterwarnings("ignore:Profiler")
def test_a_short_run_is_profiled_as_far_as_it_goes(steps: int, recorded: int | None, tmp_path: Path) -> None:
    trace = tmp_path / "profile.json"
    with timing.profiled(trace, steps=steps) as after_step:
        for _ in range(steps):
            with torch.profiler.record_function("work"):
                pass
            after_step()
    events = json.loads(trace.read_text())["traceEvents"] if trace.is_file() else None
    found = None if events is None else [event.get("name") for event in events].count("work")
    assert found == recorded


def test_the_log_has_the_times_and_a_profile_is_a_chrome_trace(trained: Path, tmp_path: Path) -> None:
    run = [
        *TINY,
        "--student",
        "tiny_network:tiny",
        "--epochs",
        4,
        "--log-every",
        4,
        "--profile",
        "--out",
        tmp_path / "r",
    ]
    result = call_script("train/distill.py", *run, "--teacher", "runs/teacher/best.pt", cwd=trained)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    for line in logged:
        assert set(line["step_ms"]) == {"data", "teacher", "student", "losses", "backward", "optimizer"}
        assert set(line["speed"]) == {"images_per_s", "data_share", "peak_memory_gib", "eta_s"}
    assert logged[-1]["speed"]["eta_s"] == 0
    names = {event.get("name") for event in json.loads((tmp_path / "r/profile.json").read_text())["traceEvents"]}
    assert {"teacher", "student", "losses", "backward", "optimizer"} <= names
