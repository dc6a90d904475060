"""A study: its statistics by hand, and one that is run, stopped, gone on with and asked for something else."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from helpers import NETWORK_WITH_BACKBONE, call_script, write_folder_dataset

from aicsd_deploy.config import DistillConfig
from aicsd_deploy.data.spec import open_dataset
from aicsd_deploy.errors import InputError
from aicsd_deploy.study import cells as cells_module
from aicsd_deploy.study.config import StudyConfig
from aicsd_deploy.study.plots import TILE_WIDTH, draw_strip, strip_methods
from aicsd_deploy.study.results import paired_difference, summarize, to_markdown

RECIPE = """
data: folder:data
model: small_network:small
batch_size: 4
epochs: 2
val_every: 1
threads: 1
warmup_steps: 2
lr: 0.02
seeds: [0, 1]
teacher_recipe: {model: "small_network:small", epochs: 4}
variants:
  gentle: {method: aicsd, balance: 0.1, alw_routing: kd-fades}
"""


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("study")
    write_folder_dataset(work / "data")
    (work / "small_network.py").write_text(NETWORK_WITH_BACKBONE)
    (work / "study.yaml").write_text(RECIPE)
    result = study(work, "--methods", "none,kd,kd", "--seeds", "0,0")
    assert result.returncode == 0, result.stderr
    assert len(json.loads((work / "out/study.json").read_text())["cells"]) == 2, "a cell counts once"
    (work / "first").write_text(str((work / "out/cells/kd-seed0/best.pt").stat().st_mtime_ns))
    result = study(work, "--methods", "none,kd,gentle")
    assert result.returncode == 0, result.stderr
    return work


def study(work: Path, *arguments: str):  # type: ignore[no-untyped-def]
    return call_script("train/study.py", "--config", "study.yaml", "--out", "out", *arguments, cwd=work)


def test_a_study_goes_on_and_leaves_table_and_pictures(studied: Path) -> None:
    out = studied / "out"
    assert int((studied / "first").read_text()) == (out / "cells/kd-seed0/best.pt").stat().st_mtime_ns, "not run twice"
    found = json.loads((out / "study.json").read_text())
    assert list(found["methods"]) == ["none", "kd", "gentle"]
    assert {(c["name"], c["seed"]) for c in found["cells"]} == {(n, s) for n in found["methods"] for s in (0, 1)}
    for cell in found["cells"]:
        last = (out / "cells" / f"{cell['name']}-seed{cell['seed']}" / "metrics.jsonl").read_text().splitlines()[-1]
        assert cell["miou"] == json.loads(last)["val"]["miou"]
        assert cell["peak_memory_mib"] > 0
    scores = {n: [c["miou"] for c in found["cells"] if c["name"] == n] for n in found["methods"]}
    kd = found["methods"]["kd"]
    assert kd["miou_mean"] == pytest.approx(sum(scores["kd"]) / 2)
    assert kd["miou_sd"] == pytest.approx(abs(scores["kd"][0] - scores["kd"][1]) / math.sqrt(2))
    ce = sum(scores["none"]) / 2
    assert kd["gap_closed"] == pytest.approx((kd["miou_mean"] - ce) / (found["teacher"]["miou"] - ce))
    assert found["methods"]["gentle"]["minus_kd"]["seeds"] == 2
    assert "| gentle |" in (out / "study.md").read_text()
    for picture in ("curves.png", "classes.png", "strip.png"):
        assert (out / picture).stat().st_size > 1000
    tiles = ["frame", "truth", "CE", "kd", "gentle", "teacher"]
    assert cv2.imread(str(out / "strip.png")).shape[1] == len(tiles) * TILE_WIDTH


def test_a_study_without_cross_entropy_says_what_that_leaves_out(studied: Path) -> None:
    found = json.loads((studied / "out/study.json").read_text())
    assert "no classes.png" not in to_markdown(found, "")
    del found["methods"]["none"]
    assert "no classes.png: add it to --methods" in to_markdown(found, "")


def test_cells_that_predict_one_class_everywhere_are_named(studied: Path) -> None:
    found = json.loads((studied / "out/study.json").read_text())
    for cell in found["cells"]:
        cell["per_class_iou"] = {"road": 0.4, "sky": 0.1, "never": None}
    assert "Collapsed" not in to_markdown(found, "")
    for cell in found["cells"]:
        if (cell["name"], cell["seed"]) in (("none", 1), ("kd", 1)):
            cell["per_class_iou"] = {"road": 0.4, "sky": 0.0, "never": None}
    assert "**Collapsed to one class:** none, seed 1; kd, seed 1." in to_markdown(found, "")
    for cell in found["cells"]:
        cell["per_class_iou"] = {"road": 1.0, "sky": None, "never": None}
    assert "Collapsed" not in to_markdown(found, ""), "the images have one class only"


def test_the_strip_shows_the_best_methods_of_the_study_beside_cross_entropy() -> None:
    scores = {"none": 0.1, "kd": 0.5, "cwd": 0.9, "dist": 0.8, "aicsd": 0.2, "icsd": 0.7}
    methods = {name: {"miou_mean": score} for name, score in scores.items()}
    assert strip_methods(methods) == ["none", "cwd", "dist", "icsd"]
    del methods["none"]
    assert strip_methods(methods) == ["kd", "cwd", "dist", "icsd"]


def test_the_cells_of_a_seed_start_from_the_same_weights_and_see_the_same_images(studied: Path) -> None:
    first = {}
    for name in ("none", "kd", "gentle"):
        lines = (studied / f"out/cells/{name}-seed0/metrics.jsonl").read_text().splitlines()
        first[name] = json.loads(lines[0])["terms"]["ce"]
    assert first["none"] == first["kd"] == first["gentle"]


def test_what_a_cell_cannot_be_is_said_before_anything_runs(studied: Path) -> None:
    result = study(studied, "--methods", "none,magic")
    assert result.returncode == 2
    assert "no method or variant 'magic'" in result.stderr
    assert "gentle" in result.stderr
    result = study(studied, "--methods", "none", "--epochs", "3")
    assert result.returncode == 2
    assert "epochs: was 2, now 3" in result.stderr
    (studied / "longer.yaml").write_text(RECIPE.replace("epochs: 4", "epochs: 5"))
    result = study(studied, "--config", "longer.yaml")
    assert result.returncode == 2
    assert re.search(r"out/teacher holds a run with other settings:\n  epochs: was 4, now 5", result.stderr)
    result = study(studied, "--qat")
    assert result.returncode == 2
    assert "needs --init" in result.stderr
    teacher = studied / "other.pt"
    content = torch.load(studied / "out/teacher/best.pt", weights_only=True)
    content["model"]["head.1.bias"] += 1
    torch.save(content, teacher)
    result = study(studied, "--methods", "none,kd", "--teacher", "other.pt")
    assert result.returncode == 2
    assert re.search(r"kd-seed0 was run.*\n  teacher: was out/teacher/best\.pt \(.*, now other\.pt \(", result.stderr)
    for seeds, wrong in (("zero", "zero"), ("2,-1", "given: -1")):
        result = study(studied, "--seeds", seeds)
        assert result.returncode == 2
        assert wrong in result.stderr
    result = study(studied, "--teacher", "none.pt", "--seeds", "2")
    assert result.returncode == 2
    assert "none.pt does not exist" in result.stderr
    assert not list(studied.glob("out/cells/*-seed2"))


def test_a_cell_without_a_teacher_sees_no_larger_pictures() -> None:
    study = StudyConfig(methods=["none", "kd"], teacher_scale=2)
    cells = [study.cell(name, 0, teacher="t.pt") for name in study.methods]
    assert [(c.teacher, c.teacher_scale) for c in cells] == [(None, 1), ("t.pt", 2)]


def test_a_variant_does_not_change_the_seed_of_its_cells() -> None:
    study = StudyConfig(variants={"odd": {"method": "kd", "seed": 7}})
    assert study.cell("odd", 1, teacher="t.pt").seed == 1


def test_a_cell_of_an_older_version_that_did_not_know_a_setting_still_counts(studied: Path) -> None:
    path = studied / "out/cells/none-seed0/cell.json"
    cell = json.loads(path.read_text())
    del cell["settings"]["teacher_confidence"]
    path.write_text(json.dumps(cell))
    result = study(studied, "--methods", "none", "--seeds", "0")
    assert result.returncode == 0, result.stderr
    result = study(studied, "--methods", "none", "--seeds", "0", "--teacher-confidence", "0.5")
    assert result.returncode == 2
    assert "teacher_confidence: was 0.0, now 0.5" in result.stderr


def test_the_strip_shows_the_running_mean_of_the_weights_which_is_scored(studied: Path) -> None:
    (studied / "mean.yaml").write_text(RECIPE + "ema: 0.5\n")
    result = call_script(
        "train/study.py", "--config", "mean.yaml", "--teacher", "out/teacher/best.pt", "--methods", "none", "--seeds", 0,
        "--out", "mean", cwd=studied,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    shown = cv2.imread(str(studied / "mean/strip.png"))
    last = studied / "mean/cells/none-seed0/last.pt"
    content = torch.load(last, weights_only=True)
    content["model"] = {name: torch.zeros_like(value) for name, value in content["model"].items()}
    torch.save(content, last)
    found = json.loads((studied / "mean/study.json").read_text())
    data = open_dataset(f"folder:{studied / 'data'}", "val")
    assert np.array_equal(cv2.imread(str(draw_strip(found, data, studied / "mean"))), shown)


def test_adapters_are_saved_with_the_run_and_not_with_the_student(studied: Path) -> None:
    arguments = ["--config", "study.yaml", "--teacher", "out/teacher/best.pt"]
    recipe = [
        line
        for line in RECIPE.splitlines()
        if line.split(":")[0] not in ("seeds", "teacher_recipe", "variants", "  gentle")
    ]
    (studied / "recipe.yaml").write_text("\n".join(recipe))
    arguments[1] = "recipe.yaml"
    result = call_script(
        "train/distill.py", *arguments, "--method", "ickd", "--balance", 0.5, "--out", "ickd", cwd=studied
    )
    assert result.returncode == 0, result.stderr
    last = torch.load(studied / "ickd/last.pt", weights_only=True)
    assert set(last["training"]["loss"]) == {"squares_ce", "squares_ickd", "adapter.weight"}
    assert last["training"]["loss"]["adapter.weight"].shape == (16, 16, 1, 1)
    assert not any("adapter" in name for name in torch.load(studied / "ickd/best.pt", weights_only=True)["model"])


def cells(*scores: float) -> list[dict[str, float]]:
    return [{"seed": seed, "miou": score} for seed, score in enumerate(scores)]


def test_a_cell_counts_its_last_epoch_not_its_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trains(settings: DistillConfig, folder: Path, *, resume: bool) -> dict[str, Any]:
        folder.mkdir()
        lines = [{"epoch": e, "val": {"miou": m, "per_class_iou": {"a": m}}} for e, m in ((1, 0.5), (2, 0.7), (3, 0.6))]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return {"miou": 0.7, "seconds": 1.0, "teacher": None, "provenance": {}, "parameters": 1}

    monkeypatch.setattr(cells_module, "distill", trains)
    cell = cells_module._run_cell(DistillConfig(method="none"), "none", tmp_path / "cell")
    assert (cell["miou"], cell["best_miou"], cell["per_class_iou"]) == (0.6, 0.7, {"a": 0.6})
    found = summarize(StudyConfig(methods=["none"]), [cell])["methods"]["none"]
    assert (found["miou_mean"], found["best_miou_mean"]) == (0.6, 0.7)


@pytest.mark.parametrize(
    ("methods", "trained"),
    [({"a": {"method": "none"}}, 0), ({"a": {"method": "kd", "teacher": "t.pt"}}, 0), ({"a": {"method": "kd"}}, 1)],
)
def test_a_teacher_is_trained_only_for_cells_that_use_it(
    methods: dict[str, dict[str, Any]], trained: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []
    monkeypatch.setattr(cells_module, "train_teacher", lambda settings, folder, *, resume: calls.append(folder))
    monkeypatch.setattr(cells_module, "_sha256_of_teacher", lambda *_: "1" * 64)
    monkeypatch.setattr(cells_module, "_run_cell", lambda settings, name, folder: {})
    cells_module.run_study(StudyConfig(methods=list(methods), variants=methods), tmp_path)
    assert calls == [tmp_path / "teacher"] * trained


def test_every_method_has_its_cell_of_a_seed_before_the_next_seed_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[int, str]] = []
    monkeypatch.setattr(cells_module, "_sha256_of_teacher", lambda *_: "1" * 64)
    monkeypatch.setattr(
        cells_module, "_run_cell", lambda settings, name, folder: ran.append((settings.seed, name)) or {"name": name}
    )
    study = StudyConfig(methods=["none", "kd"], seeds=[3, 1], teacher="t.pt")
    found = cells_module.run_study(study, tmp_path)
    assert ran == [(3, "none"), (3, "kd"), (1, "none"), (1, "kd")]
    assert [cell["name"] for cell in found] == ["none", "none", "kd", "kd"]


def test_what_a_study_is_not_given_its_cells_are_not_given_either() -> None:
    cell = StudyConfig(qat="cpu", init=Path("student.pt"), epochs=3).cell("kd", 0, teacher="t.pt")
    assert "epochs" in cell.model_fields_set
    assert not {"lr", "model"} & cell.model_fields_set, "which follow from --qat and --init"


def write_cell(folder: Path, settings: DistillConfig, **content: Any) -> None:
    folder.mkdir()
    (folder / "cell.json").write_text(json.dumps({"settings": settings.model_dump(mode="json"), **content}))


def test_a_variant_that_had_no_teacher_and_now_has_one_is_another_cell(tmp_path: Path) -> None:
    write_cell(tmp_path / "a", DistillConfig(method="none"), teacher=None, teacher_sha256=None)
    with pytest.raises(InputError, match="method: was 'none', now 'kd'"):
        cells_module._finished_cell(DistillConfig(method="kd", teacher="t.pt"), tmp_path / "a", "1" * 64)


def test_a_cell_of_an_older_version_that_did_not_hash_its_teacher_still_counts(tmp_path: Path) -> None:
    settings = DistillConfig(method="kd", teacher="t.pt")
    write_cell(tmp_path / "a", settings, teacher={"path": "t.pt", "miou": 0.5})
    assert cells_module._finished_cell(settings, tmp_path / "a", "1" * 64) is not None


def test_the_seeds_of_a_method_give_the_mean_of_each_class_and_the_highest_memory() -> None:
    common = {"name": "none", "miou": 0.5, "best_miou": 0.5, "seconds": 1.0, "teacher": None}
    made = [
        common | {"seed": 0, "peak_memory_mib": 300.0, "per_class_iou": {"a": 0.2, "b": None, "c": None}},
        common | {"seed": 1, "peak_memory_mib": 100.0, "per_class_iou": {"a": 0.6, "b": 0.5, "c": None}},
    ]
    found = summarize(StudyConfig(methods=["none"]), made)["methods"]["none"]
    assert found["peak_memory_mib"] == 300
    assert found["per_class_iou_mean"] == {"a": pytest.approx(0.4), "b": 0.5, "c": None}


def test_the_gap_ends_at_the_teacher_as_the_method_shows_it(studied: Path) -> None:
    found = json.loads((studied / "out/study.json").read_text())
    scores = {"none": (0.3, None), "kd": (0.4, 0.5), "kd_larger": (0.4, 0.7), "kd_worse": (0.4, 0.2)}
    made = [
        found["cells"][0] | {"name": name, "miou": miou, "teacher": teacher and {"path": "t.pt", "miou": teacher}}
        for name, (miou, teacher) in scores.items()
    ]
    study = summarize(StudyConfig.model_validate(found["recipe"]), made)
    gaps = {name: method["gap_closed"] for name, method in study["methods"].items()}
    assert gaps.pop("kd_worse") is None, "there is no gap to a teacher that is worse than cross-entropy alone"
    assert gaps == pytest.approx({"none": 0, "kd": 0.5, "kd_larger": 0.25})
    assert study["methods"]["kd"]["minus_kd"] is None
    assert "teacher 50.00 or 70.00 or 20.00 % at the size that it is shown" in to_markdown(study, "")


def test_pairs_are_cells_of_the_same_seed_in_whatever_order_they_came() -> None:
    ours = [{"seed": 2, "miou": 0.72}, {"seed": 0, "miou": 0.51}, {"seed": 5, "miou": 0.9}]
    theirs = [{"seed": 0, "miou": 0.5}, {"seed": 1, "miou": 0.1}, {"seed": 2, "miou": 0.7}]
    found = paired_difference(ours, theirs)
    assert found is not None
    assert found["seeds"] == 2
    assert found["mean"] == pytest.approx(0.015)
    assert found["standard_error"] == pytest.approx(0.005)


def test_paired_difference_by_hand() -> None:
    found = paired_difference(cells(0.5, 0.6, 0.7), cells(0.4, 0.4, 0.4))
    assert found is not None
    assert found["mean"] == pytest.approx(0.2)
    assert found["standard_error"] == pytest.approx(0.1 / math.sqrt(3))
    reach = 4.302653 * 0.1 / math.sqrt(3)  # Student's t, two degrees of freedom, 97.5 %
    assert found["ci95"] == pytest.approx([0.2 - reach, 0.2 + reach], rel=1e-5)
    assert paired_difference(cells(0.5), []) is None
    only = paired_difference(cells(0.5), cells(0.4))
    assert only is not None
    assert only["ci95"] is None
