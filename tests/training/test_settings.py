"""Settings that would make a run another one than its name says: each is refused before the first step."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
from helpers import NETWORK, TINY, call_script, write_folder_dataset

from aicsd_deploy.config import DistillConfig, read_config, validated
from aicsd_deploy.errors import InputError
from aicsd_deploy.models import command_for
from aicsd_deploy.training.resume import check_same_run


@pytest.mark.parametrize(
    "setting",
    [
        {"mask_ignored": False},
        {"teacher_errors": "mask"},
        {"teacher_confidence": 0.5},
        {"temperature": 2.0},
        {"distill_size": "full"},
    ],
)
def test_methods_on_features_refuse_what_is_for_logits(setting: dict[str, object]) -> None:
    (name,) = setting
    for method in ("at", "sp", "ickd"):
        with pytest.raises(
            InputError, match=f"{method} compares whole maps of features, so {name} would change nothing"
        ):
            validated(DistillConfig, {"method": method, **setting})
        dumped = validated(DistillConfig, {"method": method}).model_dump(mode="json")
        assert validated(DistillConfig, dumped).method == method, "as a recorded run has them: all given, by default"
    for method in ("none", "kd", "dist", "aicsd"):
        assert validated(DistillConfig, {"method": method, **setting}).method == method


@pytest.mark.parametrize("setting", ["sync_bn", "checkpoint_activations"])
def test_qat_refuses_what_computes_blocks_otherwise(setting: str) -> None:
    assert validated(DistillConfig, {setting: True}).qat == "off"
    with pytest.raises(InputError, match="takes neither sync_bn nor checkpoint_activations"):
        validated(DistillConfig, {"qat": "cpu", setting: True})


@pytest.mark.parametrize(("scale", "fits"), [((1, 1), True), ((0.5, 8), True), ((0, 1), False), ((1, 8.5), False)])
def test_the_random_scale_lies_above_0_and_up_to_8(scale: tuple[float, float], fits: bool) -> None:
    if fits:
        assert validated(DistillConfig, {"scale": scale}).scale == scale
    else:
        with pytest.raises(InputError, match="above 0 and up to 8"):
            validated(DistillConfig, {"scale": scale})


def test_a_setting_that_a_file_has_in_two_spellings_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("image_size: 96x128\nimage-size: 64x64\n")
    with pytest.raises(InputError, match="'image_size' twice"):
        read_config(DistillConfig, argparse.Namespace(config=file))


def test_a_run_with_another_class_map_or_other_classes_is_not_gone_on_with(tmp_path: Path) -> None:
    names = write_folder_dataset(tmp_path / "data") / "classes.txt"
    (tmp_path / "tiny_network.py").write_text(NETWORK)
    teacher = [*TINY, "--model", "tiny_network:tiny", "--epochs", 1, "--out", "teacher"]
    assert call_script("train/teacher.py", *teacher, cwd=tmp_path).returncode == 0
    student = [
        *TINY,
        "--student",
        "tiny_network:tiny",
        "--teacher",
        "teacher/best.pt",
        "--epochs",
        1,
        "--out",
        "student",
    ]

    def go_on(class_map: str) -> str:
        (tmp_path / "map.yaml").write_text(class_map)
        result = call_script("train/distill.py", *student, "--class-map", "map.yaml", "--resume", "auto", cwd=tmp_path)
        return f"{result.returncode} {result.stderr}"

    assert go_on("red: red\ngreen: green\n").startswith("0")
    assert "already trained" in go_on("red: red\ngreen: green\n")
    assert re.search(r"^2 [^$]*SHA-256 of the class map: was", go_on("red: green\ngreen: red\n"))
    names.write_text(names.read_text().replace("blue", "azure"))
    assert re.search(r"^2 [^$]*classes: was .*'blue'\], now .*'azure'\]", go_on("red: red\ngreen: green\n"))


def test_what_an_older_version_has_not_saved_does_not_hinder(tmp_path: Path) -> None:
    check_same_run({"lr": 0.1, "classes": ["a"]}, {"lr": 0.1}, folder=tmp_path)


def test_a_size_may_be_named_that_was_the_default_and_no_other(tmp_path: Path) -> None:
    then = {"image_size": None, "size of the images": [64, 96]}
    check_same_run({"image_size": [64, 96], "size of the images": [64, 96]}, then, folder=tmp_path)
    with pytest.raises(InputError, match=r"size of the images: was \[64, 96\], now \[64, 64\]"):
        check_same_run({"image_size": [64, 64], "size of the images": [64, 64]}, then, folder=tmp_path)


def test_a_crop_that_a_network_cannot_take_is_refused_before_training(tmp_path: Path) -> None:
    write_folder_dataset(tmp_path / "data")
    sizes = [*TINY, "--epochs", 1, "--image-size", "64x96", "--crop-size", "60x90"]
    result = call_script("train/teacher.py", *sizes, "--model", "smp:FPN:resnet18", "--out", "x", cwd=tmp_path)
    assert result.returncode == 2
    assert "cannot take images of 60x90" in result.stderr
    assert "--crop-size" in result.stderr
    (tmp_path / "tiny_network.py").write_text(NETWORK)
    smp.FPN("resnet18", encoder_weights=None, classes=3).save_pretrained(tmp_path / "fpn")
    student = ["--student", "tiny_network:tiny", "--teacher", "smp:fpn", "--out", "x"]
    result = call_script("train/distill.py", *sizes, *student, cwd=tmp_path)
    assert result.returncode == 2
    assert "smp:fpn cannot take images of 60x90" in result.stderr
    assert not (tmp_path / "x").exists()


TWO_INPUTS = """
class Two(nn.Module):
    def forward(self, images, depth):
        return images

def two(num_classes):
    return Two()
"""


def test_a_network_of_ones_own_that_fails_is_refused_with_what_it_is_given(tmp_path: Path) -> None:
    write_folder_dataset(tmp_path / "data")
    (tmp_path / "grey_network.py").write_text(NETWORK.replace("nn.Conv2d(3,", "nn.Conv2d(1,"))
    (tmp_path / "two_network.py").write_text(f"from torch import nn\n{TWO_INPUTS}")
    for model, says in (("grey_network:tiny", "(float32, 3 channels)"), ("two_network:two", "'depth'. Choose another")):
        result = call_script("train/teacher.py", *TINY, "--model", model, "--out", "x", cwd=tmp_path)
        assert result.returncode == 2, result.stderr
        assert says in result.stderr
        assert "or change that in the network" in result.stderr


def test_a_layer_that_gives_no_feature_map_is_refused_before_training(trained: Path, tmp_path: Path) -> None:
    network = NETWORK.replace("nn.BatchNorm2d(16)", "nn.BatchNorm2d(16), nn.Flatten(), nn.Unflatten(1, (16, 12, 16))")
    (tmp_path / "flat_network.py").write_text(network)
    (tmp_path / "tiny_network.py").write_text(NETWORK)
    flat = ["--student", "flat_network:tiny", "--method", "at", "--student-layer", "2", "--teacher-layer", "1"]
    paths = ["--data", f"folder:{trained / 'data'}", "--teacher", trained / "runs/teacher/best.pt", "--out", "x"]
    result = call_script("train/distill.py", *TINY, *flat, *paths, cwd=tmp_path)
    assert result.returncode == 2
    assert "layer '1.2' gives no feature map" in result.stderr
    assert not (tmp_path / "x").exists(), "a run that is refused leaves nothing"


def test_what_comes_next_is_said_with_the_trust_that_own_code_needs() -> None:
    assert command_for("lraspp_resnet18", "python x") == "python x"
    assert command_for("smp:FPN:resnet18", "python x") == "python x"
    assert command_for("mynet:make", "python x") == "AICSD_TRUST=mynet:make python x"
