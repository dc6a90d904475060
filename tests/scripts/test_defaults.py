"""Commands without flags take the newest run; what they write is what other programs read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from helpers import TINY, call_script

from aicsd_deploy.runs import newest_artifact, newest_comparison

ROW = {"path", "miou", "p50_ms", "p90_ms", "p99_ms", "fps", "per_class_iou", "runtime", "device"}


def test_export_and_benchmark_without_flags(trained: Path) -> None:
    assert (trained / "runs/student/student.onnx").is_file(), "the fixture exports without flags"
    result = call_script("demo/benchmark.py", "--rounds", 2, cwd=trained)
    assert result.returncode == 0, result.stderr
    report = json.loads((trained / "runs/student/report.json").read_text())
    assert report["schema_version"] == 3
    names = [Path(row["path"]).as_posix() for row in report["artifacts"]]
    assert [name.split("runs/")[1] for name in names] == ["teacher/best.pt", "student/best.pt", "student/student.onnx"]
    markdown = (trained / "runs/student/report.md").read_text()
    for row in report["artifacts"]:
        assert row.keys() >= ROW
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert f"{row['p50_ms']:.2f}" in markdown
        assert f"{100 * row['miou']:.2f}" in markdown
    assert report["environment"]["cpu"] in markdown


@pytest.mark.parametrize(
    ("command", "taken"),
    [
        ("export/to_int8.py", "student.onnx"),
        ("export/to_trt.py", "student.onnx"),
        ("export/to_trt.py --int8", "student.int8.onnx"),
        ("demo/video.py", "student.int8.onnx"),
    ],
)
def test_what_needs_a_float_file_passes_over_newer_int8_files(
    command: str, taken: str, trained: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    content = (trained / "runs/student/student.onnx").read_bytes()
    for seconds, (name, precision) in enumerate({"student.onnx": b"fp32", "student.int8.onnx": b"int8"}.items()):
        (runs / name).write_bytes(content.replace(b'"precision": "fp32"', b'"precision": "%s"' % precision)[:-1])
        os.utime(runs / name, (seconds, seconds))
    result = call_script(*command.split(), cwd=tmp_path)
    assert result.returncode == 2, "a file that is cut off, so that the command ends at once"
    assert f"runs/{taken}" in result.stderr


@pytest.mark.parametrize("int8_target", ["tensorrt", "both"])
def test_the_newest_artefact_is_one_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], int8_target: str
) -> None:
    monkeypatch.chdir(tmp_path)
    summary = '{"role": "student", "method": "kd"}'
    for seconds, folder in enumerate(("mine", "study/cells/kd-seed0")):
        (Path("runs") / folder).mkdir(parents=True)
        (Path("runs") / folder / "best.pt").touch()
        (Path("runs") / folder / "summary.json").write_text(summary)
        os.utime(Path("runs") / folder / "summary.json", (seconds, seconds))
    assert newest_artifact() == Path("runs/mine/best.pt")
    int8 = f'"precision": "int8" "int8_target": "{int8_target}"'
    precisions = {"student": '"precision": "fp32"', "student.int8": int8}
    for seconds, (name, says) in enumerate(precisions.items()):
        Path(f"runs/{name}.onnx").write_text(says)
        os.utime(f"runs/{name}.onnx", (seconds, seconds))
    assert newest_artifact() == Path("runs/student.int8.onnx")
    assert newest_artifact(fast=True) == newest_artifact(float_only=True) == Path("runs/student.onnx")
    assert capsys.readouterr().err.splitlines()[-1] == "No artefact is named: this takes runs/student.onnx"


@pytest.mark.parametrize("name", ["hf:someone/segformer", "model_best.pth.tar"])
def test_a_teacher_from_elsewhere_is_compared_once_it_is_exported(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/s").mkdir(parents=True)
    for file in ("runs/s/best.pt", "model_best.pth.tar"):
        Path(file).touch()
    summary = {"role": "student", "method": "kd", "teacher": {"path": name, "miou": 0.5}}
    Path("runs/s/summary.json").write_text(json.dumps(summary))
    assert newest_comparison() == [Path("runs/s/best.pt")]
    assert f"export/to_onnx.py {name}" in capsys.readouterr().err


def test_evaluate_writes_the_contract_and_agrees_with_training(trained: Path) -> None:
    result = call_script("train/evaluate.py", "runs/student/best.pt", "--json", "-", cwd=trained)
    assert result.returncode == 0, result.stderr
    scores = json.loads(result.stdout)
    assert set(scores) == {"miou", "per_class_iou", "pixel_accuracy", "mean_class_accuracy", "images", "label_pixels"}
    summary = json.loads((trained / "runs/student/summary.json").read_text())
    assert {k: summary[k] for k in scores} == scores


def test_one_of_several_processes_does_what_they_do_not_share(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchrun sets; that trainings are shared is tested in tests/training/test_distributed.py."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, speaks in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        result = call_script("train/evaluate.py", "runs/student/best.pt", "--json", "-", cwd=trained)
        assert result.returncode == 0, result.stderr
        assert bool(result.stdout) == ("mIoU" in result.stderr) == speaks
        assert ("process 1: nothing to do" in result.stderr) != speaks


def test_a_config_file_sets_what_flags_do_not(trained: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        "data: folder:data\nmodel: tiny_network:tiny\nepochs: 2\nbatch-size: 4\nimage_size: 24x32\nscale: [0.8, 1.2]\nthreads: 1\n"
    )
    result = call_script("train/teacher.py", "--config", config, "--epochs", 1, "--out", tmp_path / "run", cwd=trained)
    assert result.returncode == 0, result.stderr
    settings = json.loads((tmp_path / "run/summary.json").read_text())["config"]
    assert (settings["epochs"], settings["batch_size"], settings["image_size"]) == (1, 4, [24, 32])


def test_a_teacher_is_trained_where_there_is_none(trained: Path, tmp_path: Path) -> None:
    config = [
        "--data",
        f"folder:{trained / 'data'}",
        "--batch-size",
        4,
        "--epochs",
        1,
        "--threads",
        1,
        "--image-size",
        "48x64",
    ]
    student = ["--student", "lraspp_mobilenetv2", "--teacher-scale", 1.25, "--out", "runs/s"]
    result = call_script("train/distill.py", *config, *student, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs/s/teacher/best.pt").is_file()
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("runs/s", "runs/s/teacher")]
    assert [s["role"] for s in summaries] == ["student", "teacher"]
    assert [s["image_size_hw"] for s in summaries] == [[48, 64], [60, 80]], "the teacher's size is the one it is shown"


def test_a_student_that_runs_on_smaller_pictures_than_its_teacher(trained: Path, tmp_path: Path) -> None:
    teacher = json.loads((trained / "runs/teacher/summary.json").read_text())
    student = [*TINY, "--teacher", "runs/teacher/best.pt", "--student", "tiny_network:tiny", "--epochs", 1]
    scaled = call_script("train/distill.py", *student, "--teacher-scale", 2, "--out", tmp_path / "scaled", cwd=trained)
    assert scaled.returncode == 0, scaled.stderr
    summary = json.loads((tmp_path / "scaled/summary.json").read_text())
    assert summary["image_size_hw"] == [side // 2 for side in teacher["image_size_hw"]]
    assert summary["teacher"]["miou"] == pytest.approx(teacher["miou"], abs=1e-6), (
        "it sees the pictures it was trained on"
    )
    small = ["--image-size", "x".join(map(str, summary["image_size_hw"])), "--out", tmp_path / "small"]
    result = call_script("train/distill.py", *student, *small, cwd=trained)
    assert "--teacher-scale 2 shows it the size that it knows" in result.stderr
    assert "--teacher-scale" not in scaled.stderr
