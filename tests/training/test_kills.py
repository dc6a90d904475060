"""A run that is killed at the worst moments, damaged or asked to stop ends as one that was left alone, to the bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CLASSES, NETWORK, REPO, TINY, call_script, log_lines, write_folder_dataset
from tensorboard.summary.writer.record_writer import RecordWriter

from aicsd_deploy.checkpoint import Checkpoint, load_checkpoint
from aicsd_deploy.files import DISK_FULL
from aicsd_deploy.metadata import Metadata
from aicsd_deploy.tracking import RunLog
from aicsd_deploy.training.last import LastCheckpoints
from aicsd_deploy.training.stopping import StopRequest

RUN = [*TINY, "--student", "tiny_network:tiny", "--teacher", "teacher/best.pt", "--epochs", 8, "--save-every", 5, "--log-every", 2, "--resume", "auto"]  # fmt: skip


def argv(out: str, *besides: object) -> list[str]:
    return [str(REPO / "train/distill.py"), *map(str, RUN), *map(str, besides), "--out", out]


def strike(work: Path, cases: list[dict[str, Any]]) -> list[int]:
    """Run the cases in forks of one process that has only imported: forking pytest itself would fork its threads."""
    cases = [{"cwd": str(work), "signal": signal.SIGKILL, "after": False, **case} for case in cases]
    result = subprocess.run(
        [sys.executable, str(REPO / "tools/striker.py"), json.dumps(cases)],
        capture_output=True,
        text=True,
        timeout=900,  # machines that tests share can be slow
        env={**os.environ, "OMP_NUM_THREADS": "1", "AICSD_TRUST": "tiny_network:tiny"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    codes: list[int] = json.loads(result.stdout)
    return codes


def resume(work: Path, out: str, *besides: object) -> str:
    result = call_script("train/distill.py", *RUN, *besides, "--out", out, cwd=work)
    assert result.returncode == 0, result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with data, a teacher, and runs/whole, which nothing happened to."""
    work = tmp_path_factory.mktemp("kills")
    write_folder_dataset(work / "data")
    (work / "tiny_network.py").write_text(NETWORK)
    teacher = [*TINY, "--model", "tiny_network:tiny", "--epochs", 2, "--out", "teacher"]
    assert call_script("train/teacher.py", *teacher, cwd=work).returncode == 0
    resume(work, "whole")
    return work


def assert_same(work: Path, out: str, *, like: str = "whole") -> None:
    for name in ("best.pt", "last.pt"):
        whole, other = (torch.load(work / run / name, weights_only=True) for run in (like, out))
        assert whole["model"].keys() == other["model"].keys()
        assert all(torch.equal(whole["model"][key], other["model"][key]) for key in whole["model"]), name
        assert whole["metadata"]["scores"] == other["metadata"]["scores"]
    assert log_lines(work / like) == log_lines(work / out)
    assert not list((work / out).glob(".*")), "nothing half-written may be left"


def test_killed_at_any_rename_or_moment_and_resumed_equals_uninterrupted(work: Path) -> None:
    renames = [(1, False), (2, False), (2, True), (3, False), (3, True), (4, False)]
    cases = [{"at": "replace", "n": n, "after": after} for n, after in renames]
    cases += [{"at": "step", "n": 8}, {"at": "validate", "n": 7}, {"at": "write", "n": 3}]
    # The first state that is kept is that of a validation: best.pt must not be there without it.
    unsaved = [{"at": "replace", "n": n, "after": True, "besides": ["--save-every", 100]} for n in (1, 2)]
    cases = [{**c, "argv": argv(f"killed{i}", *c.pop("besides", []))} for i, c in enumerate([*cases, *unsaved])]
    assert strike(work, cases) == [-signal.SIGKILL] * len(cases)
    for i in range(len(cases)):
        resume(work, f"killed{i}")
        assert_same(work, f"killed{i}")


@pytest.mark.parametrize(("number", "name", "code"), [(signal.SIGTERM, "SIGTERM", 75), (signal.SIGINT, "Ctrl-C", 130)])
def test_a_run_asked_to_stop_saves_at_once(number: int, name: str, code: int, work: Path) -> None:
    places = [{"at": "step", "n": 8}, {"at": "validate", "n": 6}, {"at": "write", "n": 2}]
    cases = [{**case, "argv": argv(f"{name}{i}"), "signal": number} for i, case in enumerate(places)]
    cases[0]["argv"] += ["--workers", "1"]
    assert strike(work, cases) == [code] * len(cases)
    assert f"stopped by {name} at step 8 of 24" in (work / "output.txt").read_text()
    steps = [torch.load(work / f"{name}{i}/last.pt", weights_only=True)["training"]["step"] for i in range(len(cases))]
    assert steps[0] == 8, "not the last regular save, which is at 5"
    assert steps[1] == 12, "in the validation after step 12"
    for i in range(len(cases)):
        resume(work, f"{name}{i}")
        assert_same(work, f"{name}{i}")


def test_a_second_ctrl_c_does_not_wait_and_a_job_in_the_background_hears_none() -> None:
    with StopRequest() as stop, stop.held():
        signal.raise_signal(signal.SIGINT)
        assert stop.received == "Ctrl-C"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell without job control starts it with &
    try:
        with StopRequest() as stop, stop.held():
            signal.raise_signal(signal.SIGINT)
            assert stop.received is None
            signal.raise_signal(signal.SIGTERM)
            assert stop.received == "SIGTERM"
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_last_state_is_noticed_and_the_one_before_used(work: Path, damage: str) -> None:
    out = f"damaged-{damage}"
    assert strike(work, [{"argv": argv(out), "at": "step", "n": 18}]) == [-signal.SIGKILL]
    content = bytearray((work / out / "last.pt").read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 4  # in a tensor: torch.load alone would not notice
    (work / out / "last.pt").unlink()
    (work / out / "last.pt").write_bytes(content)
    said = resume(work, out)
    assert "damaged" in said
    assert "going on from step 12" in said
    assert_same(work, out)


@pytest.mark.parametrize("step", [18, 24])
def test_a_damaged_best_network_is_made_anew(work: Path, step: int) -> None:
    """One that is found out at the end only, and is not beaten until then, would leave a run without its result."""
    out = f"best-{step}"
    if step == 24:
        shutil.copytree(work / "whole", work / out)
    else:
        assert strike(work, [{"argv": argv(out), "at": "step", "n": step}]) == [-signal.SIGKILL]
    (work / out / "best.pt").write_bytes((work / out / "best.pt").read_bytes()[:1000])
    assert "best.pt is gone or damaged; the next validation makes it anew" in resume(work, out)
    assert load_checkpoint(work / out / "best.pt").metadata.scores["epoch"] == 8
    assert "damaged" not in resume(work, out)


def test_states_that_a_run_did_not_go_on_from_are_removed(tmp_path: Path) -> None:
    states = LastCheckpoints(tmp_path, keep=2)
    metadata = Metadata("m", CLASSES, (8, 8))

    def save(step: int) -> None:
        states.save(Checkpoint(metadata, {}, {"step": step}))

    save(1)
    (tmp_path / "step-00000009.pt").write_text("damaged, and so passed over")
    save(2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "step-00000001.pt"]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_as_many_states_are_kept_as_asked_and_the_newest_whole_one_is_taken(keep: int, tmp_path: Path) -> None:
    metadata = Metadata("m", CLASSES, (8, 8))

    def save(states: LastCheckpoints, step: int) -> None:
        states.save(Checkpoint(metadata, {}, {"step": step, "optimizer": {}, "config": {}, "identity": {}}))

    states = LastCheckpoints(tmp_path, keep=keep)
    for step in (1, 2, 3, 4):
        save(states, step)
    older = [f"step-{step:08d}.pt" for step in (1, 2, 3)][4 - keep :]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", *older]
    if keep == 1:
        (tmp_path / "step-00000002.pt").write_bytes(b"of a time when more were kept")
        save(states, 5)
        assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    else:
        (tmp_path / "last.pt").unlink()  # of which there may be a second name
        (tmp_path / "last.pt").write_bytes(b"damaged")
        resumed = LastCheckpoints(tmp_path, keep=keep)
        found = resumed.load()
        assert found is not None
        assert found.training["step"] == 3
        save(resumed, 5)
        assert load_checkpoint(tmp_path / "step-00000003.pt").training["step"] == 3, "not what was damaged"


def test_a_full_disk_leaves_the_state_before_and_says_so(work: Path) -> None:
    good = torch.save

    def fills_up(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            Path(args[1]).write_bytes(b"half")
            raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534")
        good(*args, **kwargs)

    calls: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", fills_up)
        result = call_script("train/distill.py", *RUN, "--out", "full", cwd=work)
    assert result.returncode == 2
    assert "last.pt cannot be written" in result.stderr or "best.pt cannot be written" in result.stderr
    assert "MiB are free" in result.stderr
    assert torch.load(work / "full/last.pt", weights_only=True)["training"]["step"] == 10
    resume(work, "full")
    assert_same(work, "full")


@pytest.mark.parametrize("code", DISK_FULL)
def test_a_disk_that_is_full_when_a_line_is_logged(code: int, work: Path) -> None:
    good, out = RunLog.write, f"log-{code}"

    def fills_up(log: RunLog, step: int, **values: Any) -> None:
        if step == 9:
            raise OSError(code, os.strerror(code))
        good(log, step, **values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "write", fills_up)
        result = call_script("train/distill.py", *RUN, "--out", out, cwd=work)
    assert result.returncode == 2
    assert os.strerror(code) in result.stderr
    assert "last.pt is whole" in result.stderr
    resume(work, out)
    assert_same(work, out)


def test_a_disk_that_is_full_when_the_log_is_opened(work: Path) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(DISK_FULL[0], os.strerror(DISK_FULL[0]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.utils.tensorboard.SummaryWriter", full)
        result = call_script("train/distill.py", *RUN, "--out", "unopened", cwd=work)
    assert result.returncode == 2
    assert "unopened cannot be written to: No space left on device. Make room" in result.stderr


def test_a_disk_that_is_full_for_tensorboard_alone(work: Path) -> None:
    """It writes in a thread of its own, whose error is told once and without a traceback."""
    good, calls, unraised = RecordWriter.write, [], []

    def fills_up(writer: RecordWriter, data: bytes) -> None:
        calls.append(1)
        if len(calls) > 40:
            raise OSError(DISK_FULL[0], os.strerror(DISK_FULL[0]))
        good(writer, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", unraised.append)
        patch.setattr(RecordWriter, "write", fills_up)
        result = call_script("train/distill.py", *RUN, "--out", "board", cwd=work)
    assert result.returncode == 2
    assert "board cannot be written to: No space left on device." in result.stderr
    assert not unraised


def test_quantisation_aware_training_is_resumed_with_its_ranges(work: Path) -> None:
    qat = ["--qat", "--init", "whole/best.pt", "--lr", 0.002]
    resume(work, "qat", *qat)
    assert strike(work, [{"argv": argv("qat_killed", *qat), "at": "step", "n": 8}]) == [-signal.SIGKILL]
    resume(work, "qat_killed", *qat)
    assert_same(work, "qat_killed", like="qat")
