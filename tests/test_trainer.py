"""A run that is killed, at any moment, ends as one that was not; and what a run leaves behind."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import NETWORK, REPO, TINY, call_script, log_lines, run_script, write_folder_dataset
from torch import nn

from aicsd_deploy import tracking
from aicsd_deploy import trainer as trainer_module
from aicsd_deploy.checkpoint import load_checkpoint, save_checkpoint
from aicsd_deploy.config import TrainConfig
from aicsd_deploy.data.dataset import read_mask
from aicsd_deploy.data.loader import Batch
from aicsd_deploy.data.transforms import Augmentation
from aicsd_deploy.errors import Preempted
from aicsd_deploy.files import write_png
from aicsd_deploy.metadata import Metadata, SegClass
from aicsd_deploy.tracking import picture_page, picture_row, plot_curves
from aicsd_deploy.trainer import Trainer


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / "last.pt", weights_only=True)["model"]
    return state


def test_a_run_is_not_resumed_with_another_teacher(trained: Path, tmp_path: Path) -> None:
    common = [*TINY, "--student", "tiny_network:tiny", "--epochs", 2, "--out", tmp_path / "s", "--resume", "auto"]
    assert call_script("train/distill.py", *common, "--teacher", "runs/teacher/best.pt", cwd=trained).returncode == 0
    result = call_script("train/distill.py", *common, "--teacher", "runs/teacher/last.pt", cwd=trained)
    assert result.returncode == 2
    assert "SHA-256 of the teacher" in result.stderr
    result = call_script("train/distill.py", *common, cwd=trained)
    assert result.returncode == 0, "without --teacher it takes the one it began with"


def test_a_run_folder_that_cannot_be_is_told_before_the_data_is_looked_at(trained: Path) -> None:
    arguments = [*TINY, "--model", "tiny_network:tiny", "--out", "tiny_network.py"]
    result = call_script("train/teacher.py", *arguments, cwd=trained)
    assert result.returncode == 2
    assert "Cannot write tiny_network.py/best.pt: Not a directory" in result.stderr
    assert "images kept" not in result.stderr


def test_that_icsd_has_nothing_to_compare_between_two_classes_is_said(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text("red: red\ngreen: green\n")
    arguments = [*TINY, "--student", "tiny_network:tiny", "--epochs", 1, "--log-every", 1, "--out", tmp_path / "r"]
    teacher = ["--teacher", "runs/teacher/best.pt", "--class-map", tmp_path / "map.yaml"]
    result = call_script("train/distill.py", *arguments, *teacher, cwd=trained)
    assert "the ICSD term is 0" in result.stderr
    terms = [line["terms"]["icsd"] for line in log_lines(tmp_path / "r") if "terms" in line]
    assert terms
    assert max(terms) < 1e-9
    arguments[-1] = tmp_path / "raw"
    result = call_script("train/distill.py", *arguments, *teacher, "--icsd-normalize", "none", cwd=trained)
    assert "the ICSD term is 0" not in result.stderr
    assert min(line["terms"]["icsd"] for line in log_lines(tmp_path / "raw") if "terms" in line) > 1e-9


def test_two_processes_do_not_train_in_one_folder(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "r"
    arguments = [*TINY, "--student", "tiny_network:tiny", "--epochs", 2, "--resume", "auto", "--out"]
    trains = (
        "import sys; from pathlib import Path; from aicsd_deploy.tracking import RunLog\n"
        "log = RunLog(Path(sys.argv[1]), keep_bytes=0, step=0); log.write(1, loss=1.0); print('writes', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", trains, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPO
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"writes\n"
        (out / ".last.1.tmp.pt").write_bytes(b"the other process is writing it")
        result = call_script("train/distill.py", *arguments, out, cwd=trained)
        assert result.returncode == 2
        assert "Another process is training in" in result.stderr
        assert [line["step"] for line in log_lines(out)] == [1]
        assert (out / ".last.1.tmp.pt").exists()
        other.kill()
    assert call_script("train/distill.py", *arguments, out, cwd=trained).returncode == 0
    assert not (out / ".last.1.tmp.pt").exists()


@pytest.mark.parametrize("script", ["train/teacher.py", "train/distill.py"])
def test_resuming_needs_the_name_of_the_run(script: str, trained: Path) -> None:
    before = set((trained / "runs").iterdir())
    result = call_script(script, *TINY, "--resume", "auto", cwd=trained)
    assert result.returncode == 2
    assert "--resume auto goes on with the run in --out, and none is named" in result.stderr
    assert set((trained / "runs").iterdir()) == before


def test_a_best_network_without_a_state_to_go_on_from_is_not_overwritten(trained: Path, tmp_path: Path) -> None:
    for run, script in (("teacher", "train/teacher.py"), ("student", "train/distill.py")):
        best = tmp_path / run / "best.pt"
        best.parent.mkdir()
        best.write_bytes((trained / "runs" / run / "best.pt").read_bytes())
        before = best.read_bytes()
        result = call_script(script, *TINY, "--out", best.parent, "--resume", "auto", cwd=trained)
        assert result.returncode == 2
        assert "holds best.pt but no state to go on from" in result.stderr
        assert best.read_bytes() == before


def test_the_result_is_not_written_over_a_network(trained: Path) -> None:
    best = trained / "runs/student/best.pt"
    before = best.read_bytes()
    for script, *arguments in (
        ("train/evaluate.py", best),
        ("train/teacher.py", *TINY, "--out", best.parent),
        ("train/distill.py", *TINY, "--teacher", best, "--out", "runs/other"),
    ):
        result = call_script(script, *arguments, "--json", best, cwd=trained)
        assert result.returncode == 2
        assert "--json names the same file" in result.stderr
        assert best.read_bytes() == before


def test_the_command_that_is_said_to_come_next_can_be_pasted(trained: Path, tmp_path: Path) -> None:
    arguments = [*TINY, "--model", "tiny_network:tiny", "--epochs", 1, "--out", tmp_path / "my run"]
    result = call_script("train/teacher.py", *arguments, cwd=trained)
    command = shlex.split(result.stderr.splitlines()[-1])
    assert command[-4:] == ["--data", "folder:data", "--teacher", str(tmp_path / "my run/best.pt")]


def test_a_loss_that_is_no_number_stops_before_anything_is_spoilt(trained: Path, tmp_path: Path) -> None:
    arguments = [*TINY, "--model", "tiny_network:tiny", "--epochs", 4, "--save-every", 1, "--out", tmp_path / "r"]
    import aicsd_deploy.distiller as distiller

    calls, good = 0, distiller.cross_entropy

    def breaks_at_the_sixth(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return good(logits, labels) * (float("nan") if calls == 6 else 1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distiller, "cross_entropy", breaks_at_the_sixth)
        result = call_script("train/teacher.py", *arguments, cwd=trained)
    assert result.returncode == 2
    assert "step 5: no longer a number: loss, gradient, ce" in result.stderr
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "r").values())


def test_a_resumed_run_keeps_a_best_that_it_does_not_beat(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "r"
    arguments = [
        *TINY,
        "--model",
        "tiny_network:tiny",
        "--epochs",
        2,
        "--val-every",
        1,
        "--save-every",
        1,
        "--out",
        run,
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aicsd_deploy.trainer.Trainer._stop_if_asked", stops_at_step_4)
        assert call_script("train/teacher.py", *arguments, cwd=trained).returncode == 75
    last = load_checkpoint(run / "last.pt")
    assert last.training["best"] > 0
    last.training["best"] = 1.0
    save_checkpoint(run / "last.pt", last)
    before = (run / "best.pt").read_bytes()
    assert call_script("train/teacher.py", *arguments, "--resume", "auto", cwd=trained).returncode == 0
    assert (run / "best.pt").read_bytes() == before


def test_every_step_is_taken_in_training_mode(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare, take, modes = Trainer._prepare, Trainer._take, []

    def given_in_eval_mode(trainer: Trainer) -> None:
        prepare(trainer)
        trainer.network.eval()

    def looks(trainer: Trainer, batch: Batch, *, logs: bool) -> dict[str, Any]:
        modes.append(trainer.network.training)
        return take(trainer, batch, logs=logs)

    monkeypatch.setattr(Trainer, "_prepare", given_in_eval_mode)
    monkeypatch.setattr(Trainer, "_take", looks)
    arguments = [*TINY, "--model", "tiny_network:tiny", "--epochs", 2, "--val-every", 1, "--out", tmp_path / "r"]
    assert call_script("train/teacher.py", *arguments, cwd=trained).returncode == 0
    assert modes == [True] * 6, "the validation after the third leaves no trace"


def test_the_best_network_is_the_running_mean_that_was_scored(trained: Path, tmp_path: Path) -> None:
    arguments = [*TINY, "--model", "tiny_network:tiny", "--epochs", 1, "--ema", 0.5, "--out", tmp_path / "r"]
    assert call_script("train/teacher.py", *arguments, cwd=trained).returncode == 0
    best, last = (load_checkpoint(tmp_path / "r" / name) for name in ("best.pt", "last.pt"))
    assert all(torch.equal(value, last.training["ema"][name]) for name, value in best.model.items())
    assert not torch.equal(best.model["0.weight"], last.model["0.weight"])


def test_pictures_are_changed_as_the_settings_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Augmentation] = []
    monkeypatch.setattr(trainer_module, "training_batches", lambda _, augmentation, **__: made.append(augmentation))
    settings = {"scale": (0.6, 1.7), "flip": False, "color_jitter": 0.2, "crop_size": (24, 40), "keep_aspect": True}
    metadata = Metadata("m", (SegClass("a", (0, 0, 0)),), (48, 64))
    loss: Any = SimpleNamespace(picture_scale=2.0)
    data: Any = None
    trainer = Trainer(
        nn.Identity(), loss, TrainConfig(**settings), metadata, data, data, tmp_path, torch.device("cpu"), {}
    )
    trainer._batches(0, 1)
    wanted = {"scale": (0.6, 1.7), "flip": False, "color_jitter": 0.2, "keep_aspect": True}
    assert made == [Augmentation((48, 64), **wanted, crop_size_hw=(24, 40), picture_scale=2.0)]


def stops_at_step_4(trainer: Trainer) -> None:
    if trainer._at.step == 4:  # of 6; the first validation was at step 3
        raise Preempted("stopped")


def test_a_run_leaves_everything_that_the_readme_names(trained: Path) -> None:
    for run in ("teacher", "student"):
        folder = trained / "runs" / run
        for name in (
            "best.pt",
            "last.pt",
            "metrics.jsonl",
            "summary.json",
            "curves.png",
            "confusion.png",
            "overlays.png",
        ):
            assert (folder / name).stat().st_size > 0, name
        assert list((folder / "tensorboard").glob("events*"))
    summary = json.loads((trained / "runs/student/summary.json").read_text())
    teacher = json.loads((trained / "runs/teacher/summary.json").read_text())
    assert {"miou", "per_class_iou", "pixel_accuracy", "mean_class_accuracy", "images"} <= summary.keys()
    assert summary["teacher"]["miou"] == pytest.approx(teacher["miou"])
    assert teacher["miou"] > 0.8, "the blocks are easy: a training that works learns them"
    assert summary["miou"] > 0.8
    assert summary["label_pixels"].keys() == summary["per_class_iou"].keys()
    validations = [line["val"] for line in log_lines(trained / "runs/student") if "val" in line]
    assert validations
    assert not any("label_pixels" in scores for scores in validations), "it never changes"


def test_every_term_its_gradient_and_alpha_are_logged(trained: Path) -> None:
    lines = [line for line in log_lines(trained / "runs/student") if "terms" in line]
    for line in lines:
        assert set(line["terms"]) == set(line["gradient_norm"]) == {"ce", "kd", "icsd"}  # type: ignore[call-overload]
    first, last = lines[0], lines[-1]
    assert first["alpha"] == 0
    assert last["alpha"] == 1
    assert first["gradient_norm"]["icsd"] == 0  # type: ignore[index]
    assert first["gradient_norm"]["kd"] > 0  # type: ignore[index]
    assert last["gradient_norm"]["icsd"] > 0  # type: ignore[index]
    assert last["gradient_norm"]["kd"] == 0  # type: ignore[index]


def test_the_teacher_is_scored_before_distillation_starts(trained: Path, tmp_path: Path) -> None:
    arguments = [*TINY, "--student", "tiny_network:tiny", "--epochs", 1, "--out", tmp_path / "run"]
    result = call_script("train/distill.py", *arguments, cwd=trained)
    assert result.returncode == 0, result.stderr
    assert result.stderr.index("teacher's val mIoU") < result.stderr.index("training tiny_network:tiny")


def test_resume_with_other_settings_is_refused_and_says_which(trained: Path) -> None:
    arguments = [*TINY, "--model", "tiny_network:tiny", "--epochs", 12, "--seed", 5, "--out", "runs/teacher"]
    result = call_script("train/teacher.py", *arguments, "--resume", "auto", cwd=trained)
    assert result.returncode == 2
    assert "seed: was 0, now 5" in result.stderr
    result = call_script("train/teacher.py", *arguments, cwd=trained)
    assert result.returncode == 2
    assert "already holds a run" in result.stderr


def test_a_run_goes_on_where_its_data_has_moved_and_not_with_other_data(trained: Path, tmp_path: Path) -> None:
    run = [*TINY, "--model", "tiny_network:tiny", "--epochs", 1, "--out", "r", "--resume", "auto", "--data"]
    (tmp_path / "tiny_network.py").write_text(NETWORK)
    assert call_script("train/teacher.py", *run, f"folder:{trained / 'data'}", cwd=tmp_path).returncode == 0
    shutil.copytree(trained / "data", tmp_path / "scratch")
    moved = call_script("train/teacher.py", *run, "folder:scratch", cwd=tmp_path)
    assert moved.returncode == 0
    assert "changed since this run was saved: data" in moved.stderr
    labels = min((tmp_path / "scratch/val/labels").iterdir())
    write_png(labels, 1 - np.minimum(read_mask(labels), 1))
    other = call_script("train/teacher.py", *run, "folder:scratch", cwd=tmp_path)
    assert other.returncode == 2
    assert "SHA-256 of the data's names and first labels: was" in other.stderr


def test_the_pictures_of_a_row_carry_their_names() -> None:
    black = np.zeros((50, 100, 3), np.uint8)
    row = picture_row({"truth": black, "predicted": black}, width=200, titled=True)
    assert row.shape == (104, 400, 3)
    assert all(half.max() == 255 for half in (row[:, :200], row[:, 200:]))
    assert picture_row({"truth": black}, width=200, titled=False).max() == 0


def test_a_page_of_pictures_says_which_colour_is_which_class() -> None:
    black = np.zeros((100, 400, 3), np.uint8)
    page = picture_page([black, black], (SegClass("road", (200, 10, 20)), SegClass("sky", (30, 40, 250))))
    assert page.shape[1] == 400
    assert not page[:200].any()
    for color_rgb in ((200, 10, 20), (30, 40, 250)):
        assert (page[200:] == color_rgb[::-1]).all(axis=-1).sum() > 50


def test_a_single_line_of_the_log_is_seen_in_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = {"step": 5, "terms": {"ce": 1.0}, "gradient_norm": {"ce": 0.1}, "alpha": None}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    figures: list[Any] = []
    monkeypatch.setattr(tracking, "save_figure", lambda figure, path: figures.append(figure))
    plot_curves(tmp_path)
    assert [line.get_marker() for axis in figures[0].axes[:2] for line in axis.lines] == [".", "."]


def test_memory_that_nobody_wrote_does_not_get_into_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder_dataset(tmp_path / "data", size_hw=(96, 480))  # large enough for the kernel that reads it
    monkeypatch.setenv("MALLOC_PERTURB_", "128")  # what malloc gives out is full of 3.4e38
    arguments = [*TINY, "--model", "lraspp_mobilenetv2", "--precision", "bf16", "--epochs", 1, "--out", "r"]
    result = run_script("train/teacher.py", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
