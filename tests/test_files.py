"""Files appear whole or not at all, and metadata survives its trip through a file."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import REPO

from aicsd_deploy.checkpoint import load_checkpoint
from aicsd_deploy.console import progress
from aicsd_deploy.errors import InputError, VerificationError
from aicsd_deploy.files import atomic_path, check_writable, existing_file, write_json, write_png
from aicsd_deploy.metadata import Metadata, SegClass


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"old": 1})

    def fail() -> None:
        with atomic_path(path) as temporary:
            assert temporary.suffix == ".json"
            temporary.write_text("half of it")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fail()
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_a_new_file_that_fails_its_proof_says_that_the_old_one_is_still_there(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_path(tmp_path / "student.plan"):
            raise VerificationError("It is wrong.")

    with pytest.raises(VerificationError, match=r"^It is wrong\.$"):
        fail()
    (tmp_path / "student.plan").write_text("older")
    with pytest.raises(
        VerificationError, match=r"^It is wrong\. .*student\.plan is still the file that was there before"
    ):
        fail()
    assert (tmp_path / "student.plan").read_text() == "older"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_a_file_may_be_read_by_whom_the_umask_lets(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_json(tmp_path / "file.json", {})
    finally:
        os.umask(before)
    assert (tmp_path / "file.json").stat().st_mode & 0o777 == mode


def test_a_file_that_is_written_again_keeps_its_mode_and_its_place(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    real, link = tmp_path / "disk/real.json", tmp_path / "link.json"
    real.write_text("old")
    real.chmod(0o600)
    link.symlink_to(real)
    write_json(link, {"new": 1})
    assert link.is_symlink()
    assert json.loads(real.read_text()) == {"new": 1}
    assert real.stat().st_mode & 0o777 == 0o600
    os.mkfifo(tmp_path / "pipe")
    for write in (check_writable, lambda path: write_json(path, {})):
        with pytest.raises(InputError, match="pipe is a device or a pipe"):
            write(tmp_path / "pipe")


def test_a_folder_in_the_way_and_a_file_for_a_folder_are_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a folder"), atomic_path(tmp_path):
        pass
    with pytest.raises(InputError, match=r"Cannot write .*file is a file"), atomic_path(tmp_path / "file" / "x.json"):
        pass


def test_a_name_may_be_as_long_as_the_system_takes_it(tmp_path: Path) -> None:
    name = f"{'ü' * 125}.json"
    write_json(tmp_path / name, {})
    assert [p.name for p in tmp_path.iterdir()] == [name]
    with pytest.raises((InputError, OSError), match="too long"):
        write_json(tmp_path / f"{name}.json", {})


def test_an_error_leaves_no_folder_that_was_made_for_the_file(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()

    def fail() -> None:
        with atomic_path(tmp_path / "old" / "new" / "deep" / "file.json"):
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fail()
    assert list(tmp_path.rglob("*")) == [tmp_path / "old"]
    (tmp_path / "new").mkdir()
    write_json(tmp_path / "new" / "deep" / "file.json", {})
    assert (tmp_path / "new" / "deep" / "file.json").exists()


def test_a_full_disk_is_reported_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left on device: '.*x\.plan'"), atomic_path(tmp_path / "x.plan"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_elsewhere_is_reported_with_the_file_that_the_system_names(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left on device: 'elsewhere'"), atomic_path(tmp_path / "x.plan"):
        raise OSError(errno.ENOSPC, "No space left on device", "elsewhere")


def test_a_picture_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    write_png(tmp_path / "old.png", picture)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "old.png")), picture)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, old[1]))  # no file may be larger, as on a full disk
    try:
        with pytest.raises(OSError, match=r"too large: '.*old\.png'"):
            write_png(tmp_path / "old.png", 255 - picture)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "old.png")), picture)
    with pytest.raises(InputError, match=r"wide\.png: no PNG .* 1100000x1 pixels"):
        write_png(tmp_path / "wide.png", np.zeros((1, 1_100_000), np.uint8))
    assert [path.name for path in tmp_path.iterdir()] == ["old.png"]


def test_no_picture_is_written_past_write_png() -> None:
    scripts = [
        path
        for folder in ("aicsd_deploy", "tools", "benchmarks", "train", "export", "demo")
        for path in (REPO / folder).rglob("*.py")
    ]
    assert [path for path in scripts if "cv2.imwrite(" in path.read_text()] == []


def test_a_termination_signal_leaves_nothing_behind(tmp_path: Path) -> None:
    code = (
        "import os, signal; from aicsd_deploy.cli import run; from aicsd_deploy.files import atomic_path\n"
        "def main(argv):\n"
        f"    with atomic_path({str(tmp_path / 'new' / 'x.plan')!r}) as path:\n"
        "        path.write_text('half'); os.kill(os.getpid(), signal.SIGTERM)\n"
        "run(main)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 143
    assert list(tmp_path.iterdir()) == []


def test_nan_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"miou": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_metadata_survives_json() -> None:
    metadata = Metadata(
        "net", (SegClass("a", (1, 2, 3)), SegClass("b", (4, 5, 6))), (48, 64), dynamic=("batch",), scores={"miou": 0.5}
    )
    assert Metadata.from_onnx(json.dumps(metadata.to_dict()), origin="x") == metadata


@pytest.mark.parametrize(
    "change",
    [
        {"classes": []},
        {"image_size_hw": [0, 3]},
        {"channel_order": "gbr"},
        {"mean": [1, 2]},
        {"schema_version": 99},
        {"schema_version": float("inf")},
        {"scores": 3},
        {"model": 3},
        {"data": "\x1b[2J"},
        {"classes": [{"name": "\x1b[31ma", "color_rgb": [1, 2, 3]}]},
    ],
)
def test_wrong_metadata_is_refused(change: dict[str, object]) -> None:
    value = Metadata("net", (SegClass("a", (1, 2, 3)),), (48, 64)).to_dict() | change
    with pytest.raises(InputError, match=r"x\.onnx"):
        Metadata.from_dict(value, origin="x.onnx")
    with pytest.raises(InputError, match=r"x\.onnx"):
        Metadata.from_onnx("[1", origin="x.onnx")
    with pytest.raises(InputError, match=r"x\.onnx"):
        Metadata.from_onnx("[" * 100_000, origin="x.onnx")


def test_a_run_folder_in_the_place_of_its_checkpoint_is_told_with_the_name(tmp_path: Path) -> None:
    (tmp_path / "best.pt").write_bytes(b"weights")
    with pytest.raises(InputError, match=r"is a folder, not a file\. Give .*best\.pt"):
        existing_file(tmp_path, "The checkpoint")


def test_a_name_that_is_nearly_right_is_told_with_the_right_one(tmp_path: Path) -> None:
    (tmp_path / "student.onnx").write_bytes(b"graph")
    with pytest.raises(InputError, match=r"Did you mean .*student\.onnx\?"):
        existing_file(tmp_path / "studnt.onnx", "The artefact")
    with pytest.raises(InputError) as caught:
        existing_file(tmp_path / "nowhere" / "other.pt", "The checkpoint")
    assert "mean" not in str(caught.value)


def test_a_file_that_git_lfs_has_not_fetched_is_told_with_the_way_to_it(tmp_path: Path) -> None:
    (tmp_path / "student.onnx").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    with pytest.raises(InputError, match="git lfs pull"):
        existing_file(tmp_path / "student.onnx", "The artefact")


def test_progress_goes_on_from_where_a_run_stood(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("training", 80, done=79) as advance:
        advance()
    assert "training: 80/80, 0 s left" in capsys.readouterr().err


def test_an_exported_file_in_the_place_of_a_checkpoint_is_told(tmp_path: Path) -> None:
    (tmp_path / "student.onnx").write_bytes(b"graph")
    with pytest.raises(InputError, match="exported file and no checkpoint"):
        load_checkpoint(tmp_path / "student.onnx")


def test_a_file_that_is_no_checkpoint_is_not_answered_with_how_to_load_it_unsafely(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(1, 1), tmp_path / "whole.pt")
    with pytest.raises(InputError, match=r"Give the best\.pt") as caught:
        load_checkpoint(tmp_path / "whole.pt")
    assert "Re-running" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
