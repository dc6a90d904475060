"""Backends: the same labels from .pt and .onnx, nothing silent about devices, clear words about bad files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import REPO, SIZE_HW

from aicsd_deploy.data.spec import open_dataset
from aicsd_deploy.errors import AicsdError, InputError, MissingDependencyError
from aicsd_deploy.evaluate import evaluate
from aicsd_deploy.runtime.base import open_backend
from aicsd_deploy.runtime.frames import resize_labels, segment
from aicsd_deploy.runtime.ort_backend import BoundRuns


@pytest.fixture(autouse=True)
def trust(monkeypatch: pytest.MonkeyPatch, trained: Path) -> None:
    monkeypatch.setenv("AICSD_TRUST", "tiny_network:tiny")
    monkeypatch.chdir(trained)


def test_checkpoint_and_onnx_give_the_same_labels_and_scores(trained: Path) -> None:
    dataset = open_dataset("folder:data", "val")
    matrices = []
    for name in ("best.pt", "student.onnx"):
        with open_backend(trained / "runs/student" / name, device="cpu", threads=1) as backend:
            assert backend.device == "cpu"
            matrices.append(evaluate(backend, dataset))
    assert np.abs(matrices[0].counts - matrices[1].counts).sum() <= 0.005 * matrices[0].counts.sum()
    assert matrices[0].scores(["a", "b", "c"]).miou > 0.8
    assert matrices[0].images == 4


def test_frames_of_any_size_come_back_at_their_size(trained: Path) -> None:
    image_rgb, labels = open_dataset("folder:data", "val").load(0)
    large = np.ascontiguousarray(np.kron(image_rgb[..., ::-1], np.ones((3, 3, 1), np.uint8)))
    with open_backend(trained / "runs/student/student.onnx") as backend:
        found = segment(backend, large)
    assert found.shape == (144, 192)
    expected = resize_labels(labels, (144, 192))
    counted = expected != 255
    assert (found[counted] == expected[counted]).mean() > 0.85


def test_label_maps_are_resized_without_shift() -> None:
    labels = np.arange(4, dtype=np.uint8).reshape(2, 2)
    assert resize_labels(labels, (4, 4)).tolist() == np.kron(labels, np.ones((2, 2), np.uint8)).tolist()
    assert resize_labels(resize_labels(labels, (6, 6)), (2, 2)).tolist() == labels.tolist()


@pytest.mark.parametrize("name", ["best.pt", "student.onnx"])
def test_a_gpu_that_is_asked_for_and_not_there_is_an_error(trained: Path, name: str) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(MissingDependencyError, match="--device"):
        open_backend(trained / "runs/student" / name, device="cuda")


def test_a_silent_fall_back_to_the_cpu_is_an_error(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    # onnxruntime-gpu without CUDA's libraries: it offers the provider, then quietly runs on the CPU.
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    with pytest.raises(MissingDependencyError, match="would run on the CPU instead"):
        open_backend(trained / "runs/student/student.onnx", device="cuda:0")
    assert open_backend(trained / "runs/student/student.onnx", device="auto").device == "cpu"


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "missing", "foreign", "folder"])
@pytest.mark.parametrize("name", ["best.pt", "student.onnx"])
def test_bad_artefacts_are_refused_with_their_name(trained: Path, tmp_path: Path, name: str, damage: str) -> None:
    path = tmp_path / f"bad{Path(name).suffix}"
    good = (trained / "runs/student" / name).read_bytes()
    if damage == "cut":
        path.write_bytes(good[: len(good) // 2])
    elif damage == "text":
        path.write_text("this is text")
    elif damage == "empty":
        path.touch()
    elif damage == "folder":
        path.mkdir()
    elif damage == "foreign" and name.endswith(".onnx"):
        model = onnx.load_from_string(good)
        del model.metadata_props[:]
        onnx.save(model, path)
    elif damage == "foreign":
        import torch

        torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="bad") as error:
        open_backend(path)
    assert "\n" not in str(error.value)


def test_other_kinds_of_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.engine").touch()
    with pytest.raises(InputError, match=r"\.pt, \.onnx, \.plan"):
        open_backend(tmp_path / "x.engine")
    (tmp_path / "x.plan").write_bytes(b"plan")
    with pytest.raises(AicsdError, match=r"no x\.plan\.json beside it"):
        open_backend(tmp_path / "x.plan")


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    import pickle

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (exec, (f"open({str(tmp_path / 'pwned')!r}, 'w').close()",))

    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Payload()))
    import torch

    torch.save({"metadata": Payload(), "model": {}}, tmp_path / "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(InputError, match="safely"):
            open_backend(tmp_path / name)
    assert not (tmp_path / "pwned").exists()


def test_another_data_set_is_refused(trained: Path) -> None:
    with (
        open_backend(trained / "runs/student/student.onnx") as backend,
        pytest.raises(InputError, match="classes are not those"),
    ):
        evaluate(backend, open_dataset("synthetic", "val"))


def test_bound_input_and_output_give_the_same_labels(trained: Path) -> None:
    import onnxruntime as ort

    session = ort.InferenceSession(trained / "runs/student/student.onnx", providers=["CPUExecutionProvider"])
    bound = BoundRuns(ort, session, "cpu")
    generator, found = np.random.default_rng(0), []
    for _ in range(3):  # the first makes the place, the others use it again
        frames = generator.integers(0, 256, (1, *SIZE_HW, 3), dtype=np.uint8)
        expected = session.run(None, {"frames": frames})[0]
        found.append(bound(frames))
        np.testing.assert_array_equal(found[-1], expected)
    assert not np.array_equal(found[0], found[1]), "labels are the caller's own, and follow the frames"


@pytest.mark.parametrize("name", ["best.pt", "student.onnx"])
def test_frames_may_be_turned_by_slicing(trained: Path, name: str) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (1, *SIZE_HW, 3), dtype=np.uint8)
    with open_backend(trained / "runs/student" / name, device="cpu") as backend:
        turned = frames[..., ::-1]
        np.testing.assert_array_equal(backend.infer(turned), backend.infer(turned.copy()))
        backend.time_stages([turned, turned])


def test_between_frames_a_session_leaves_the_cores_to_others(trained: Path) -> None:
    program = (  # a process of its own: threads that other tests leave behind may have something to do
        "import sys, time; import numpy as np; from aicsd_deploy.runtime.base import open_backend\n"
        "spent_s = []\n"
        "with open_backend(sys.argv[1], device='cpu', threads=2) as backend:\n"
        "    for _ in range(5):\n"
        "        backend.infer(np.zeros((1, *map(int, sys.argv[2:]), 3), np.uint8))\n"
        "        before_s = time.process_time()\n"
        "        time.sleep(0.04)\n"
        "        spent_s.append(time.process_time() - before_s)\n"
        "print(min(spent_s))\n"
    )
    command = [sys.executable, "-c", program, str(trained / "runs/student/student.onnx"), *map(str, SIZE_HW)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPO)
    assert float(result.stdout) < 0.02, "its threads spin"
