"""On a GPU: engines built, run and compared; graph replay, threads and every owner of memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers import random_checkpoint

from aicsd_deploy.data.spec import open_dataset
from aicsd_deploy.errors import AicsdError, MissingDependencyError
from aicsd_deploy.export.engine import Request, make_engine
from aicsd_deploy.export.onnx_export import export_onnx
from aicsd_deploy.export.tensorrt_build import BuildOptions
from aicsd_deploy.export.verify import compare, frames_for_comparison
from aicsd_deploy.files import sha256
from aicsd_deploy.runtime.base import open_backend
from aicsd_deploy.runtime.device_memory import OWNERS, open_memory
from aicsd_deploy.runtime.tensorrt_module import Flavor, load_tensorrt, require_tensorrt_gpu
from aicsd_deploy.runtime.trt_backend import TensorRTBackend

SIZE_HW = (96, 128)


def flavors() -> list[Flavor]:
    found: list[Flavor] = []
    for flavor in ("tensorrt", "rtx"):
        try:
            require_tensorrt_gpu(flavor, why="")
            load_tensorrt(flavor)
        except MissingDependencyError:
            continue
        found.append(flavor)
    return found


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not flavors(), reason="needs a GPU, and TensorRT or TensorRT-RTX")]


@pytest.fixture(scope="module", params=flavors())
def flavor(request: pytest.FixtureRequest) -> Flavor:
    return request.param


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    classes = open_dataset("synthetic", "val").classes
    checkpoint = random_checkpoint(folder / "best.pt", "deeplabv3plus_mobilenetv2", SIZE_HW, classes)
    provenance = {"checkpoint_sha256": sha256(folder / "best.pt")}
    metadata = checkpoint.metadata.replace(dynamic=("batch",), provenance=provenance)
    export_onnx(checkpoint.build(), metadata, folder / "net.onnx")
    return folder / "net.onnx"


@pytest.fixture(scope="module")
def plan(flavor: Flavor, onnx_file: Path) -> Path:
    path = onnx_file.with_name(f"{flavor}.plan")
    make_engine(onnx_file, path, Request("fp16", flavor, BuildOptions()))
    return path


def batch(count: int, seed: int = 0) -> np.ndarray:
    scenes = open_dataset(f"synthetic:{SIZE_HW[0]}x{SIZE_HW[1]}", "val")
    return np.stack([np.ascontiguousarray(scenes.load(seed + i)[0][..., ::-1]) for i in range(count)])


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_gate_runs_the_engine_itself(flavor: Flavor, onnx_file: Path, precision: str, tmp_path: Path) -> None:
    card = make_engine(onnx_file, tmp_path / "s.plan", Request(precision, flavor))  # type: ignore[arg-type]
    assert str(card.gate["compared"]).startswith("the engine on ")
    assert card.precision_found["weights"].keys() == {precision}


def test_the_engine_labels_as_the_checkpoint(plan: Path, onnx_file: Path) -> None:
    frames = frames_for_comparison(open_dataset("synthetic", "val"), count=8)
    with open_backend(onnx_file.with_name("best.pt"), device="cpu") as reference, open_backend(plan) as engine:
        assert compare(reference, engine, frames).share >= 0.99


def test_replaying_a_graph_gives_what_running_gives(plan: Path) -> None:
    with TensorRTBackend(plan, graph=True) as replayed, TensorRTBackend(plan, graph=False) as run:
        for count in (1, 4, 1, 11):
            np.testing.assert_array_equal(replayed.infer(batch(count)), run.infer(batch(count)))


def test_threads_do_not_mix_frames(plan: Path) -> None:
    with TensorRTBackend(plan, lanes=3) as engine, ThreadPoolExecutor(8) as threads:
        frames = [batch(1, seed) for seed in range(24)]
        expected = [engine.infer(frame) for frame in frames]
        for _ in range(5):
            for found, right in zip(threads.map(engine.infer, frames), expected, strict=True):
                np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize("owner", OWNERS)
def test_every_owner_of_memory_gives_the_same_labels(plan: Path, owner: str) -> None:
    try:
        open_memory(owner)
    except AicsdError as error:
        pytest.skip(str(error))
    with TensorRTBackend(plan, memory=owner) as engine, TensorRTBackend(plan) as reference:
        for count in (1, 3):
            np.testing.assert_array_equal(engine.infer(batch(count)), reference.infer(batch(count)))
        stages = engine.time_stages([batch(1)] * 4)
        assert stages.keys() == {"host_to_device", "network", "device_to_host"}
        assert min(stages.values()) > 0


def test_memory_is_given_back(plan: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch, which counts here, can use no GPU")
    free = []
    for _ in range(4):
        with TensorRTBackend(plan) as engine:
            engine.infer(batch(2))
        torch.cuda.empty_cache()
        free.append(torch.cuda.mem_get_info()[0])
    assert free[-1] >= free[1] - 2**20
