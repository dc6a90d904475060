"""Every command, given something wrong: one clear message, exit code 2, no traceback, no file left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import call_script, write_folder_dataset
from PIL import Image

CKPT, ONNX = "runs/student/best.pt", "runs/student/student.onnx"


def prepare_bad_files(folder: Path, trained: Path) -> None:
    (folder / "text.onnx").write_text("no network")
    (folder / "text.pt").write_text("no network")
    (folder / "text.mp4").write_text("no video")
    (folder / "empty.onnx").touch()
    (folder / "bare.plan").write_text("an engine")
    onnx, checkpoint = (trained / ONNX).read_bytes(), (trained / CKPT).read_bytes()
    (folder / "cut.onnx").write_bytes(onnx[: len(onnx) // 2])
    (folder / "cut.pt").write_bytes(checkpoint[: len(checkpoint) // 2])
    checkpoint_of_another_network(trained / CKPT, folder / "other.pt")
    torch.save({"weight": torch.zeros(3)}, folder / "foreign.pt")
    (folder / "empty").mkdir()
    for name, damage in DAMAGED_DATA.items():
        damage(write_folder_dataset(folder / name))
    (folder / "wrong_size.yaml").write_text("data: folder:data\nimage_size: huge\n")
    (folder / "wrong_number.yaml").write_text("data: folder:data\nlr: .inf\n")
    (folder / "bad.yaml").write_text("epochs: [1")
    (folder / "unknown.yaml").write_text("epocs: 3\n")


def text_for_an_image(root: Path) -> None:
    (root / "train/images/003.png").write_text("no picture")


def unknown_class_id(root: Path) -> None:
    Image.new("L", (64, 48), 9).save(root / "val/labels/001.png")


def no_images(root: Path) -> None:
    for path in (root / "train/images").iterdir():
        path.unlink()


def empty_list(root: Path) -> None:
    (root / "val.txt").write_text("\n")


DAMAGED_DATA = {
    "text_png": text_for_an_image,
    "unknown_id": unknown_class_id,
    "no_images": no_images,
    "empty_list": empty_list,
}


def checkpoint_of_another_network(good: Path, bad: Path) -> None:
    """Write a checkpoint whose weights are not those of the network that it names."""
    content = torch.load(good, weights_only=True)
    content["metadata"]["model"] = "lraspp_mobilenetv2"
    torch.save(content, bad)


CASES = {
    "teacher, wrong path": ("train/teacher.py --data camvid:/no/such --out {o}", "/no/such"),
    "teacher, unknown data": ("train/teacher.py --data kitti --out {o}", "kitti"),
    "teacher, unknown network": ("train/teacher.py --data folder:data --model resnet9000 --out {o}", "resnet9000"),
    "teacher, bad size": ("train/teacher.py --image-size 96 --out {o}", "HEIGHTxWIDTH"),
    "teacher, zero epochs": ("train/teacher.py --epochs 0 --out {o}", "epochs"),
    "teacher, word for a number": ("train/teacher.py --epochs many --out {o}", "--epochs"),
    "teacher, unknown flag": ("train/teacher.py --epoch 3 --out {o}", "--epoch"),
    "teacher, bad device": ("train/teacher.py --data folder:data --device tpu --out {o}", "tpu"),
    "teacher, missing weights": (
        "train/teacher.py --data folder:data --model lraspp_resnet18 --backbone-weights {t}/none.pth --out {o}",
        "none.pth",
    ),
    "teacher, config that is no YAML": ("train/teacher.py --config {t}/bad.yaml --out {o}", "bad.yaml"),
    "teacher, config with an unknown setting": ("train/teacher.py --config {t}/unknown.yaml --out {o}", "epocs"),
    "teacher, folder without its kind": ("train/teacher.py --data data --out {o}", "Did you mean folder:data?"),
    "teacher, too large batch": ("train/teacher.py --data folder:data --batch-size 99 --out {o}", "99"),
    "teacher, size in words": ("train/teacher.py --config {t}/wrong_size.yaml --out {o}", "huge"),
    "teacher, endless rate": ("train/teacher.py --config {t}/wrong_number.yaml --out {o}", "lr"),
    "teacher, text named png": ("train/teacher.py --data folder:{t}/text_png --out {o}", "003.png"),
    "teacher, unknown class id": ("train/teacher.py --data folder:{t}/unknown_id --out {o}", "label value 9"),
    "teacher, empty folder": ("train/teacher.py --data folder:{t}/no_images --out {o}", "no pictures"),
    "teacher, empty list": ("train/teacher.py --data folder:{t}/empty_list --out {o}", "names no image"),
    "evaluate, empty list": (
        "train/evaluate.py " + ONNX + " --data folder:{t}/empty_list --json {o}",
        "names no image",
    ),
    "teacher, own code that is no network": (
        "train/teacher.py --data folder:data --model os.path:join --out {o}",
        "os.path:join",
    ),
    "teacher, own code without a name": ("train/teacher.py --data folder:data --model :net --out {o}", ":net"),
    "teacher, a size its network cannot take": (
        "train/teacher.py --data folder:data --model smp:DeepLabV3Plus:resnet18 --image-size 40x40 --out {o}",
        "40x40",
    ),
    "teacher, weights that are a checkpoint": (
        "train/teacher.py --data folder:data --model lraspp_resnet18 --backbone-weights " + CKPT + " --out {o}",
        "ResNet weights",
    ),
    "distill, none with a teacher": (
        "train/distill.py --data folder:data --method none --teacher x.pt --out {o}",
        "takes no",
    ),
    "distill, none with a class map": (
        "train/distill.py --data folder:data --method none --class-map x.yaml --out {o}",
        "takes no --class-map",
    ),
    "distill, none with a teacher's pictures": (
        "train/distill.py --data folder:data --method none --teacher-scale 2 --out {o}",
        "takes no --teacher-scale",
    ),
    "teacher, batch of one": (
        "train/teacher.py --batch-size 1 --out {o}",
        "batch_size: must be at least 2 (given: 1). It is: images per step",
    ),
    "teacher, scales in the wrong order": (
        "train/teacher.py --scale 2 1 --out {o}",
        "  scale 2.0 1.0: give two factors",
    ),
    "teacher, half an epoch": ("train/teacher.py --epochs 0.5 --out {o}", "--epochs: not a whole number: '0.5'"),
    "study, no method": ("train/study.py --methods , --out {o}", "methods: must name at least one"),
    "distill, a class map without a teacher": (
        "train/distill.py --data synthetic:16x16 --class-map " + CKPT + " --out {o}",
        "Name it with --teacher",
    ),
    "distill, missing teacher": ("train/distill.py --data folder:data --teacher {t}/none.pt --out {o}", "none.pt"),
    "distill, text teacher": ("train/distill.py --data folder:data --teacher {t}/text.pt --out {o}", "text.pt"),
    "distill, cut teacher": ("train/distill.py --data folder:data --teacher {t}/cut.pt --out {o}", "cut.pt"),
    "distill, teacher of other classes": (
        "train/distill.py --data synthetic --teacher " + CKPT + " --out {o}",
        "classes",
    ),
    "distill, teacher that is another network": (
        "train/distill.py --data folder:data --teacher {t}/other.pt --out {o}",
        "do not fit the network",
    ),
    "distill, no checkpoint of ours": (
        "train/distill.py --data folder:data --teacher {t}/foreign.pt --out {o}",
        "foreign.pt",
    ),
    "evaluate, another network": ("train/evaluate.py {t}/other.pt --json {o}", "do not fit the network"),
    "to_onnx, another network": ("export/to_onnx.py {t}/other.pt -o {o}.onnx", "do not fit the network"),
    "distill, teacher folder that is none": (
        "train/distill.py --data folder:data --teacher hf:{t}/empty --out {o}",
        "cannot be loaded",
    ),
    "distill, features of a network without a backbone": (
        "train/distill.py --data folder:data --teacher " + CKPT + " --student tiny_network:tiny --method sp --out {o}",
        "--student-layer",
    ),
    "distill, missing class map": (
        "train/distill.py --data folder:data --teacher " + CKPT + " --class-map {t}/none.yaml --out {o}",
        "none.yaml",
    ),
    "evaluate, protocol for an exported file": (
        "train/evaluate.py " + ONNX + " --native --json {o}",
        "Name a checkpoint",
    ),
    "study, unknown method": ("train/study.py --data folder:data --methods none,magic --out {o}", "magic"),
    "distill, unknown method": ("train/distill.py --method magic --out {o}", "magic"),
    "evaluate, missing": ("train/evaluate.py {t}/none.onnx --json {o}", "none.onnx"),
    "evaluate, cut": ("train/evaluate.py {t}/cut.onnx --json {o}", "cut.onnx"),
    "evaluate, other classes": ("train/evaluate.py " + ONNX + " --data synthetic --json {o}", "classes"),
    "evaluate, unknown split": ("train/evaluate.py " + ONNX + " --split all --json {o}", "all"),
    "to_onnx, missing": ("export/to_onnx.py {t}/none.pt -o {o}.onnx", "none.pt"),
    "to_onnx, text": ("export/to_onnx.py {t}/text.pt -o {o}.onnx", "text.pt"),
    "to_onnx, wrong suffix": ("export/to_onnx.py " + CKPT + " -o {o}.txt", ".onnx"),
    "to_onnx, a map of what is known": (
        "export/to_onnx.py " + CKPT + " -o {o}.onnx --class-map {t}/text.pt",
        "has its classes",
    ),
    "to_onnx, bad size": ("export/to_onnx.py " + CKPT + " -o {o}.onnx --image-size 1x1", "1x1"),
    "to_trt, missing": ("export/to_trt.py {t}/none.onnx --fp16 -o {o}.plan", "none.onnx"),
    "to_trt, cut": ("export/to_trt.py {t}/cut.onnx --fp16 -o {o}.plan", "cut.onnx"),
    "to_trt, a checkpoint": ("export/to_trt.py " + CKPT + " --fp16 -o {o}.plan", "to_onnx.py"),
    "to_trt, two precisions": ("export/to_trt.py " + ONNX + " --fp16 --int8 -o {o}.plan", "--int8"),
    "to_trt, wrong suffix": ("export/to_trt.py " + ONNX + " -o {o}.engine", ".plan"),
    "to_trt, no loss at all to allow": ("export/to_trt.py " + ONNX + " --max-miou-drop inf -o {o}.plan", "0 to 100"),
    "to_trt, no card": ("export/to_trt.py " + ONNX + " --target , -o {o}.plan", "--target"),
    "to_trt, bytes for MiB": (
        "export/to_trt.py " + ONNX + " --flavor rtx --workspace 4294967296 -o {o}.plan",
        "in MiB",
    ),
    "to_trt, the result over the card": (
        "export/to_trt.py " + ONNX + " --flavor rtx -o {o}.plan --json {o}.plan.json",
        "another name",
    ),
    "to_onnx, the result over the file": ("export/to_onnx.py " + CKPT + " -o {o}.onnx --json {o}.onnx", "another name"),
    "to_int8, the result over the file": ("export/to_int8.py " + ONNX + " -o {o}.onnx --json {o}.onnx", "another name"),
    "to_trt, an engine into a file": (
        "export/to_trt.py {t}/cut.onnx --flavor rtx -o {t}/text.mp4/s.plan",
        "Cannot write",
    ),
    "to_trt, no folder for frames": (
        "export/to_trt.py " + ONNX + " --flavor rtx --data folder:none -o {o}.plan",
        "none",
    ),
    "video, a plan without its card": ("demo/video.py --engine {t}/bare.plan -o {o}.mp4", "bare.plan.json"),
    "to_int8, missing": ("export/to_int8.py {t}/none.onnx -o {o}.onnx", "none.onnx"),
    "to_int8, cut": ("export/to_int8.py {t}/cut.onnx -o {o}.onnx", "cut.onnx"),
    "to_int8, a checkpoint": ("export/to_int8.py " + CKPT + " -o {o}.onnx", "to_onnx.py"),
    "to_int8, wrong suffix": ("export/to_int8.py " + ONNX + " -o {o}.plan", ".onnx"),
    "to_int8, into its own source": ("export/to_int8.py " + ONNX + " -o " + ONNX, "the float32 file itself"),
    "to_int8, all layers in float": (
        "export/to_int8.py " + ONNX + " --keep-float first last --method minmax -o {o}.onnx",
        "leaves every layer of",
    ),
    "to_int8, other data": ("export/to_int8.py " + ONNX + " --data synthetic -o {o}.onnx", "classes are not those"),
    "to_int8, a share of what": ("export/to_int8.py " + ONNX + " --max-miou-drop much -o {o}.onnx", "much"),
    "benchmark, a rule that is none": (
        "demo/benchmark.py " + ONNX + " --baseline {t}/text.onnx --fail-if p50_ms --out {o}",
        "is no rule",
    ),
    "benchmark, a baseline that is none": (
        "demo/benchmark.py " + ONNX + " --baseline {t}/text.onnx --fail-if p50_ms>1.1x --out {o}",
        "no report.json",
    ),
    "benchmark, a rule without a baseline": (
        "demo/benchmark.py " + ONNX + " --fail-if p50_ms>1.1x --out {o}",
        "name its report.json with --baseline",
    ),
    "benchmark, a baseline without a rule": (
        "demo/benchmark.py " + ONNX + " --baseline {t}/text.onnx --out {o}",
        "--baseline is compared by --fail-if",
    ),
    "benchmark, a reference that is not there": (
        "demo/benchmark.py " + ONNX + " --reference x.onnx --out {o}",
        "none of the artefacts",
    ),
    # Two faults each: what cannot be written is to be said before anything is read.
    "benchmark, a report into a file": ("demo/benchmark.py {t}/cut.onnx --out {t}/text.mp4", "Cannot write"),
    # Likewise a wrong name, before every file of the data is looked at.
    "teacher, unknown network for bad data": (
        "train/teacher.py --data folder:{t}/text_png --model resnet9000 --out {o}",
        "resnet9000",
    ),
    "benchmark, other data": (
        "demo/benchmark.py " + ONNX + " --data synthetic --out {o}",
        "student.onnx's classes are not those",
    ),
    "benchmark, missing": ("demo/benchmark.py {t}/none.onnx --out {o}", "none.onnx"),
    "benchmark, cut": ("demo/benchmark.py " + ONNX + " {t}/cut.onnx --out {o}", "cut.onnx"),
    "benchmark, empty": ("demo/benchmark.py {t}/empty.onnx --out {o}", "empty.onnx"),
    "video, missing engine": ("demo/video.py --engine {t}/none.onnx -o {o}.mp4", "none.onnx"),
    "video, cut engine": ("demo/video.py --engine {t}/cut.onnx -o {o}.mp4", "cut.onnx"),
    "video, missing source": ("demo/video.py --engine " + ONNX + " --source {t}/none.mp4 -o {o}.mp4", "none.mp4"),
    "video, text source": ("demo/video.py --engine " + ONNX + " --source {t}/text.mp4 -o {o}.mp4", "text.mp4"),
    "video, empty folder": ("demo/video.py --engine " + ONNX + " --source {t}/empty -o {o}.mp4", "empty"),
    "video, unknown suffix": ("demo/video.py --engine " + ONNX + " -o {o}.gif", ".gif"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case: str, trained: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    prepare_bad_files(bad, trained)
    command, expected = CASES[case]
    script, *arguments = command.format(t=bad, o=tmp_path / "made").split()
    result = call_script(script, *arguments, cwd=trained)
    assert result.returncode == 2, result.stderr
    assert expected in result.stderr
    assert "Traceback" not in result.stderr
    assert "error: " in result.stderr
    assert not list(tmp_path.glob("made*")), "nothing may be left behind"
    assert not list(tmp_path.glob(".made*"))


def test_nothing_to_work_on_is_said_with_the_way_out(tmp_path: Path) -> None:
    for script in (
        "export/to_onnx.py",
        "export/to_int8.py",
        "export/to_trt.py",
        "demo/benchmark.py",
        "demo/video.py",
        "train/evaluate.py",
    ):
        result = call_script(script, cwd=tmp_path)
        assert result.returncode == 2, (script, result.stderr)
        assert "train/distill.py" in result.stderr
        assert list(tmp_path.iterdir()) == []


def test_tensorrt_says_what_this_machine_lacks(trained: Path, tmp_path: Path) -> None:
    import ctypes

    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        arguments = [ONNX, "--fp16", "--flavor", "tensorrt", "-o", tmp_path / "x.plan"]
        result = call_script("export/to_trt.py", *arguments, cwd=trained)
        assert result.returncode == 2
        assert "no NVIDIA driver" in result.stderr
        assert not list(tmp_path.iterdir())
    else:
        pytest.skip("this machine has an NVIDIA driver")


SCRIPTS = ["train/teacher.py", "train/distill.py", "train/study.py", "train/evaluate.py", "export/to_onnx.py", "export/to_int8.py", "export/to_trt.py", "demo/benchmark.py", "demo/video.py", "demo/quickstart.py"]  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_flag(script: str, tmp_path: Path) -> None:
    result = call_script(script, "--help", cwd=tmp_path)
    assert result.returncode == 0
    text = result.stdout
    assert f"python {script}" in text, "the help shows a command to copy"
    # A flag without an explanation ends its line; the explanation may also stand on the next, indented line.
    for line, following in zip(text.splitlines(), [*text.splitlines()[1:], ""], strict=True):
        if line.startswith("  --"):
            assert "  " in line.strip() or following.startswith(" " * 20), f"{line!r} is not explained"


def test_help_begins_with_what_every_training_is_given(tmp_path: Path) -> None:
    flags = call_script("train/distill.py", "--help", cwd=tmp_path).stdout.partition("options:")[2]
    assert flags.index("--teacher NAME") < flags.index("--optimizer")
