"""demo/video.py as a user runs it: one message for bad input, and nothing written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from video_helpers import CLASSES, encode, grey_frames, read_back

from aicsd_deploy.cli import needed_packages
from aicsd_deploy.errors import InputError
from aicsd_deploy.files import write_png
from aicsd_deploy.video.flags import parse

ROOT = Path(__file__).parents[2]
RUN_WITH_FAKE_NETWORK = """
import runpy, sys
sys.path.insert(0, {helpers!r})
import aicsd_deploy.runtime.base as base
from video_helpers import Threshold
base.open_backend = lambda path, **kwargs: Threshold()
sys.argv = ["video.py", *sys.argv[1:]]
runpy.run_path({script!r}, run_name="__main__")
"""


def run_script(folder: Path, flags: str, *, fake_network: bool = False) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "demo" / "video.py")
    fake = RUN_WITH_FAKE_NETWORK.format(helpers=str(Path(__file__).parent), script=script)
    return subprocess.run(
        [sys.executable, *(["-c", fake] if fake_network else [script]), *flags.split()],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DISPLAY": "", "WAYLAND_DISPLAY": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_it_segments_a_file_and_says_what_it_did(tmp_path: Path) -> None:
    encode(tmp_path / "in.mp4", grey_frames(12))
    done = run_script(tmp_path, "--engine e.onnx --source in.mp4 -o out.mp4 --json r.json", fake_network=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["frames_in"], result["frames_out"], result["dropped"]) == (12, 12, 0)
    assert (result["backend"], result["source"], result["output"]) == ("threshold", "in.mp4", "out.mp4")
    assert result["fps"] > 0
    assert {"mean", "p50", "p90", "p99", "decode", "infer", "render", "encode"} == set(result["latency_ms"])
    assert len(read_back(tmp_path / "out.mp4")[0]) == 12
    assert done.stderr.rstrip().endswith("out.mp4")


def test_a_suffix_may_be_in_capitals(tmp_path: Path) -> None:
    encode(tmp_path / "in.MP4", grey_frames(3))
    names = ["OUT.MP4", "OUT.Mkv", "OUT.MOV", "OUT.JSONL"]
    flags = f"--engine e.onnx --source in.MP4 -o {' -o '.join(names)}"
    done = run_script(tmp_path, flags, fake_network=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"in.MP4", *names}
    assert [len(read_back(tmp_path / name)[0]) for name in names[:3]] == [3, 3, 3]
    assert len((tmp_path / "OUT.JSONL").read_text().splitlines()) == 3


@pytest.mark.parametrize(("flags", "code"), [("", 2), ("--max-frames 3", 0)])
def test_too_few_label_maps_are_told_before_the_work(tmp_path: Path, flags: str, code: int) -> None:
    encode(tmp_path / "in.mp4", grey_frames(4))
    (tmp_path / "labels").mkdir()
    for number in range(3):
        write_png(tmp_path / "labels" / f"{number}.png", np.zeros((48, 64), np.uint8))
    done = run_script(
        tmp_path, f"--engine e.onnx --source in.mp4 --labels labels -o out.mp4 {flags}", fake_network=True
    )
    assert done.returncode == code, done.stderr
    assert ("has 4 frames, but --labels has only 3 label maps" in done.stderr) == (code == 2)
    assert len(list(tmp_path.glob("out*.mp4"))) == (code == 0)


@pytest.mark.parametrize(
    ("flags", "says"),
    [("", ["warning: in.mp4 has 4 frames, but --labels has 6 label maps."]), ("--max-frames 3", [])],
)
def test_more_label_maps_than_frames_are_told(tmp_path: Path, flags: str, says: list[str]) -> None:
    encode(tmp_path / "in.mp4", grey_frames(4))
    (tmp_path / "labels").mkdir()
    for number in range(6):
        write_png(tmp_path / "labels" / f"{number}.png", np.zeros((48, 64), np.uint8))
    done = run_script(tmp_path, f"--engine e.onnx --source in.mp4 --labels labels {flags}", fake_network=True)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"warning: .* label maps\.", done.stderr.replace("\n", " ")) == says


def test_opacity_reaches_the_picture(tmp_path: Path) -> None:
    encode(tmp_path / "in.mp4", grey_frames(2, (240, 320)))
    flags = "--engine e.onnx --source in.mp4 -o out.mp4 --opacity 1"
    assert run_script(tmp_path, flags, fake_network=True).returncode == 0
    middle = read_back(tmp_path / "out.mp4")[1][0][120, 160]
    np.testing.assert_allclose(middle, CLASSES[0].color_rgb[::-1], atol=8)


def test_without_a_source_it_shows_the_built_in_scene_and_says_so(tmp_path: Path) -> None:
    pytest.importorskip("aicsd_deploy.data.synthetic")
    done = run_script(tmp_path, "--engine e.onnx --max-frames 3 -o out.mp4", fake_network=True)
    assert done.returncode == 0, done.stderr
    assert "built-in street scene" in done.stderr
    assert len(read_back(tmp_path / "out.mp4")[0]) == 3


def test_without_an_output_it_shows_the_video_in_a_browser_and_says_where(tmp_path: Path) -> None:
    done = run_script(tmp_path, "--engine e.onnx --source synthetic --max-frames 2", fake_network=True)
    assert done.returncode == 0, done.stderr
    assert "http://127.0.0.1:" in done.stderr
    assert "http" not in done.stderr.splitlines()[-1], "it has ended, so there is nothing to look at"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--source in.mp4 -o out.mp4", "no"),
        ("--engine missing.onnx --source in.mp4 -o out.mp4", "missing.onnx does not exist"),
        ("--engine in.mp4 --source e.onnx -o out.mp4", "write --engine e.onnx"),
        ("--engine in.mp4 -o out.mp4", "write --source in.mp4"),
        ("--engine in.txt --source in.mp4 -o out.mp4", "in.txt does not exist"),
        ("--engine e.onnx --source in.mp4 -o out.mp4", "e.onnx"),
        ("--engine e.onnx --source in.mp4 -o out.avi", "must end in .mp4, .mkv, .mov (a video)"),
        ("--engine e.onnx --source in.mp4 -o -", "Cannot write -"),
        ("--engine e.onnx --source in.mp4 -o .mp4", "Cannot write .mp4"),
        ("--engine e.onnx --source in.mp4 --window", "no display"),
        ("--engine e.onnx --audio", "needs a video"),
        ("--engine e.onnx --split test", "--split test chooses images of a data set, and --labels names none"),
        ("--engine e.onnx --source in.mp4 --preview 99999", "not an address"),
        ("--engine e.onnx --smooth 1000", "too many"),
        ("--engine e.onnx --json in.mp4/r.json", "Cannot write"),
        ("--engine e.onnx --source in.mp4 -o out.mp4 --json ./in.mp4", "--json names the same file"),
        ("--engine e.onnx --source in.mp4 -o out.mp4 --json out.mp4", "--json names the same file"),
        ("--engine e.onnx --source in.mp4 -o out.mp4 --json e.onnx", "--json names the same file"),
        ("--engine e.onnx --source in.mp4 -o out.mp4 -o folder/../out.mp4", "two -o"),
        ("--engine e.onnx --source -in.mp4 -o out.mp4", "FLAG=VALUE"),
        ("--engine e.onnx --source in.mp4 --loop --audio -o out.mp4", "leave out --audio or --loop"),
        ("--engine e.onnx --opacity 1.5 -o out.mp4", "not an opacity"),
        ("--engine e.onnx --max-frames 0 -o out.mp4", "too small"),
        ("--engine e.onnx --frobnicate", "frobnicate"),
        ("in.mp4", "write --source in.mp4"),
        ("--source in.mp4 e.onnx", "write --engine e.onnx"),
        ("--source img1.png img2.png", "give the folder of several pictures"),
    ],
)
def test_bad_flags_and_engines_give_one_message_and_no_file(tmp_path: Path, flags: str, says: str) -> None:
    encode(tmp_path / "in.mp4", grey_frames(2))
    (tmp_path / "e.onnx").write_text("not a network")
    check_refused(tmp_path, run_script(tmp_path, flags), says)


@pytest.mark.parametrize("source", ["missing.mp4", "text.mp4", "empty.mp4", "folder"])
def test_a_bad_source_gives_one_message_and_no_file(tmp_path: Path, source: str) -> None:
    (tmp_path / "text.mp4").write_text("not a video\n" * 50)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder").mkdir()
    flags = f"--engine e.onnx --source {source} -o out.mp4"
    check_refused(tmp_path, run_script(tmp_path, flags, fake_network=True), source)


def test_a_missing_camera_gives_one_line(tmp_path: Path) -> None:
    done = run_script(tmp_path, "--engine e.onnx --source 97 -o out.mp4", fake_network=True)
    check_refused(tmp_path, done, "Camera 97 cannot be opened")
    assert len(done.stderr.splitlines()) == 1


def test_an_address_of_a_file_is_that_file_to_every_flag(tmp_path: Path) -> None:
    path = tmp_path / "a b.mp4"
    assert parse(None, ["--source", path.as_uri(), "--audio", "-o", "out.mp4"]).source == str(path)
    with pytest.raises(InputError, match="--json names the same file"):
        parse(None, ["--source", path.as_uri(), "--json", str(path)])


def test_names_of_classes_may_have_spaces_around_them() -> None:
    assert parse(None, ["--classes", "road, lane marking"]).classes == ["road", "lane marking"]


def test_the_input_is_not_overwritten(tmp_path: Path) -> None:
    encode(tmp_path / "in.mp4", grey_frames(2))
    before = (tmp_path / "in.mp4").read_bytes()
    flags = "--engine e.onnx --source in.mp4 -o ./in.mp4"
    check_refused(tmp_path, run_script(tmp_path, flags, fake_network=True), "is the input itself")
    assert (tmp_path / "in.mp4").read_bytes() == before


def test_ctrl_c_while_packages_are_loaded_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="130"), needed_packages():
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "interrupted\n"


def check_refused(folder: Path, done: subprocess.CompletedProcess[str], says: str) -> None:
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1
    assert done.stdout == ""
    assert {p.name for p in folder.iterdir()} <= {"in.mp4", "e.onnx", "text.mp4", "empty.mp4", "folder"}


def test_help_explains_every_flag(tmp_path: Path) -> None:
    done = run_script(tmp_path, "--help")
    assert done.returncode == 0
    for flag in (
        "--engine",
        "--source",
        "--output",
        "--window",
        "--json",
        "--opacity",
        "--device",
        "--threads",
        "--max-frames",
        "--preview",
        "--loop",
        "--audio",
        "--classes",
        "--contour",
        "--smooth",
        "--fit",
        "--labels",
    ):
        assert flag in done.stdout


def test_the_video_code_needs_no_more_than_numpy_opencv_and_pyav() -> None:
    blocked = ("torch", "torchvision", "pydantic", "rich", "matplotlib", "yaml", "PIL", "onnx", "jinja2", "scipy")
    code = f"""
import sys
for name in {blocked!r}:
    sys.modules[name] = None  # import of it fails
import aicsd_deploy.video.sources, aicsd_deploy.video.video_file, aicsd_deploy.video.sinks
import aicsd_deploy.video.overlay, aicsd_deploy.video.pipeline, aicsd_deploy.runs, aicsd_deploy.video.flags
import aicsd_deploy.video.video_writer, aicsd_deploy.video.streams, aicsd_deploy.video.scoring
with aicsd_deploy.video.sources.open_source("synthetic", synthetic_hw=(48, 64)) as source:
    next(iter(source))
"""
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=60)


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_the_exit_code_tells_the_signal_that_ended_a_file(tmp_path: Path, number: str, code: int) -> None:
    encode(tmp_path / "in.mp4", grey_frames(55))
    fake = RUN_WITH_FAKE_NETWORK.format(helpers=str(Path(__file__).parent), script=str(ROOT / "demo" / "video.py"))
    signals = f"""
import os, signal
from video_helpers import Threshold
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background would have it ignored
class Signals(Threshold):
    def infer(self, frames):
        if self.calls == 20:
            os.kill(os.getpid(), signal.{number})
        return super().infer(frames)
base.open_backend = lambda path, **kwargs: Signals()
"""
    before, after = fake.split("base.open_backend = lambda path, **kwargs: Threshold()\n")
    flags = ["--engine", "e.onnx", "--source", "in.mp4", "--in-flight", "1", "-o", "out.mp4", "--json", "r.json"]
    command = [sys.executable, "-c", before + signals + after, *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (code, "interrupted"), done.stderr
    assert len(read_back(tmp_path / "out.mp4")[0]) == json.loads((tmp_path / "r.json").read_text())["frames_out"] < 55


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which is a full disk")
def test_where_the_json_cannot_be_written_the_rest_has_been_said(tmp_path: Path) -> None:
    encode(tmp_path / "in.mp4", grey_frames(12))
    fake = RUN_WITH_FAKE_NETWORK.format(helpers=str(Path(__file__).parent), script=str(ROOT / "demo" / "video.py"))
    fake = fake.replace("import runpy, sys", "import runpy, sys\nsys.stdout.reconfigure(line_buffering=True)")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", fake, *["--engine", "e.onnx", "--source", "in.mp4", "-o", "out.mp4", "--json", "-"]],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 2, done.stderr
    told = done.stderr.splitlines()
    assert told[-3].startswith("12 of 12 frames")
    assert told[-2] == "out.mp4"
    assert "No space left" in told[-1]
