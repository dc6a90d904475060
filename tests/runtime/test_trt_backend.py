"""The TensorRT backend's control flow, on a fake with TensorRT's surface, and every way in which an engine does not fit."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_tensorrt import NUM_CLASSES, FakeMemory, fake_tensorrt
from helpers import CLASSES

from aicsd_deploy.errors import InputError, MissingDependencyError
from aicsd_deploy.files import sha256
from aicsd_deploy.metadata import Metadata
from aicsd_deploy.runtime import device_memory, trt_backend
from aicsd_deploy.runtime.base import open_backend
from aicsd_deploy.runtime.device_memory import open_memory
from aicsd_deploy.runtime.driver import Gpu
from aicsd_deploy.runtime.engine_card import EngineCard, card_path, read_card
from aicsd_deploy.runtime.trt_backend import TensorRTBackend

RTX_4090 = Gpu("RTX 4090", "sm89", (13, 0))


def write_engine(folder: Path, **changes: Any) -> Path:
    plan = folder / "student.plan"
    plan.write_bytes(b"an engine" * 100)
    card = EngineCard(
        plan_sha256=sha256(plan),
        onnx_sha256="0",
        metadata=Metadata("m", CLASSES, (8, 12), precision="fp16"),
        flavor="tensorrt",
        version="11.4.0",
        targets=(),
        gpu=RTX_4090,
        profiles=(),
        precision_found={},
        float32_nodes={},
        options={},
        gate={},
        provenance={},
    )
    dataclasses.replace(card, **changes).write(card_path(plan))
    return plan


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with a GPU and TensorRT."""
    memory = FakeMemory()
    trt = fake_tensorrt(memory)
    monkeypatch.setattr(trt_backend, "require_tensorrt_gpu", lambda flavor, why, index: RTX_4090)
    monkeypatch.setattr(trt_backend, "load_tensorrt", lambda flavor: trt)
    monkeypatch.setattr(trt_backend, "logger", lambda flavor: trt.logger)
    monkeypatch.setattr(trt_backend, "open_memory", lambda name, index: memory)
    return SimpleNamespace(memory=memory, trt=trt)


def frames(count: int, size_hw: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *size_hw, 3), dtype=np.uint8)


def expected(frames_NHWC: np.ndarray) -> np.ndarray:
    return frames_NHWC[..., 0] % NUM_CLASSES


@pytest.mark.parametrize("graph", [True, False])
def test_frames_in_labels_out(machine: SimpleNamespace, tmp_path: Path, graph: bool) -> None:
    with TensorRTBackend(write_engine(tmp_path), graph=graph, lanes=1) as backend:
        for seed in range(3):
            given = frames(1, (8, 12), seed)
            np.testing.assert_array_equal(backend.infer(given), expected(given))
        assert backend.metadata.precision == "fp16"
        assert "TensorRT fp16" in backend.name
    assert machine.memory.recorded == int(graph)
    # One run settles the kernels, one is recorded; the replays give TensorRT nothing to do.
    assert machine.trt.engine.enqueued == (2 if graph else 4)


def test_stages_are_told_by_the_gpus_own_clock(machine: SimpleNamespace, tmp_path: Path) -> None:
    with TensorRTBackend(write_engine(tmp_path), lanes=1) as backend:
        stages = backend.time_stages([frames(1, (8, 12))] * 3)
        assert stages == {"host_to_device": 1, "network": 20, "device_to_host": 3}
        given = frames(1, (8, 12), 7)
        np.testing.assert_array_equal(backend.infer(given), expected(given))  # the lane is back


def test_every_shape_gets_its_own_graph_and_profile(machine: SimpleNamespace, tmp_path: Path) -> None:
    profiles = (((1, 8, 12), (1, 8, 12), (2, 16, 24)), ((4, 8, 12), (4, 8, 12), (6, 16, 24)))
    metadata = Metadata("m", CLASSES, (8, 12), dynamic=("batch", "size"))
    with TensorRTBackend(write_engine(tmp_path, profiles=profiles, metadata=metadata), lanes=1) as backend:
        for shape, profile in (((1, 8, 12), 0), ((2, 16, 24), 0), ((5, 10, 14), 1), ((1, 8, 12), 0)):
            given = frames(shape[0], shape[1:])
            np.testing.assert_array_equal(backend.infer(given), expected(given))
            assert machine.trt.engine.contexts[0].profile == profile
        assert machine.memory.recorded == 4
        for count in (13, 9, 3):  # more than any profile takes, or between two: in parts
            given = frames(count, (8, 12))
            np.testing.assert_array_equal(backend.infer(given), expected(given))
        with pytest.raises(InputError, match=r"1x8x12 to 2x16x24; 4x8x12 to 6x16x24, not 1x99x12"):
            backend.infer(frames(1, (99, 12)))
        given = frames(1, (8, 12))
        np.testing.assert_array_equal(backend.infer(given), expected(given))  # the refusal did no harm


def test_many_threads_share_an_engine(machine: SimpleNamespace, tmp_path: Path) -> None:
    with TensorRTBackend(write_engine(tmp_path), lanes=3) as backend, ThreadPoolExecutor(8) as threads:
        assert backend.concurrency == 3
        given = [frames(1, (8, 12), seed) for seed in range(64)]
        for one, labels in zip(given, threads.map(backend.infer, given), strict=True):
            np.testing.assert_array_equal(labels, expected(one))
    assert len(machine.trt.engine.contexts) == 3


def test_a_single_caller_keeps_the_lane_that_is_ready(machine: SimpleNamespace, tmp_path: Path) -> None:
    with TensorRTBackend(write_engine(tmp_path), lanes=3) as backend:
        for seed in range(4):
            backend.infer(frames(1, (8, 12), seed))
    assert machine.memory.recorded == 1


def test_a_batch_goes_in_parts_that_its_size_allows(machine: SimpleNamespace, tmp_path: Path) -> None:
    profiles = (((1, 8, 12), (1, 8, 12), (8, 8, 12)), ((1, 32, 48), (1, 32, 48), (2, 32, 48)))
    metadata = Metadata("m", CLASSES, (8, 12), dynamic=("batch", "size"))
    with TensorRTBackend(write_engine(tmp_path, profiles=profiles, metadata=metadata), lanes=1) as backend:
        for size_hw, batches in (((8, 12), [8, 3]), ((32, 48), [2, 1])):
            given, context = frames(11, size_hw), machine.trt.engine.contexts[0]
            context.shapes.clear()
            np.testing.assert_array_equal(backend.infer(given), expected(given))
            assert [shape[0] for shape in context.shapes] == batches, "each set once and replayed"


def test_no_two_lanes_record_at_once(machine: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, both, met = machine.memory.record, threading.Barrier(2), []

    def slow(stream: Any, work: Any) -> Any:
        with suppress(threading.BrokenBarrierError):
            both.wait(0.5)
            met.append(stream)
        return record(stream, work)

    monkeypatch.setattr(machine.memory, "record", slow)
    plan, given = write_engine(tmp_path), frames(1, (8, 12))
    with TensorRTBackend(plan) as first, TensorRTBackend(plan) as second, ThreadPoolExecutor(2) as threads:
        for labels in threads.map(lambda backend: backend.infer(given), (first, second)):
            np.testing.assert_array_equal(labels, expected(given))
    assert not met


def test_two_engines_at_once(machine: SimpleNamespace, tmp_path: Path) -> None:
    plan = write_engine(tmp_path)
    with TensorRTBackend(plan) as first, TensorRTBackend(plan) as second:
        one, two = frames(1, (8, 12), 1), frames(1, (8, 12), 2)
        np.testing.assert_array_equal(first.infer(one), expected(one))
        np.testing.assert_array_equal(second.infer(two), expected(two))


@pytest.mark.parametrize(
    ("refuses", "reason"), [("", "could not start"), ("memory", "did not take the memory"), ("profile", "profile 1")]
)
def test_what_tensorrt_refuses_is_no_silent_result(
    refuses: str, reason: str, machine: SimpleNamespace, tmp_path: Path
) -> None:
    machine.trt.engine.refuses, machine.trt.engine.fails = refuses, not refuses
    profiles = (((2, 8, 12),) * 3, ((1, 8, 12),) * 3)
    metadata, given = Metadata("m", CLASSES, (8, 12), dynamic=("batch",)), frames(1, (8, 12))
    with TensorRTBackend(write_engine(tmp_path, profiles=profiles, metadata=metadata)) as backend:
        with pytest.raises(InputError, match=reason):
            backend.infer(given)
        machine.trt.engine.refuses, machine.trt.engine.fails = "", False
        np.testing.assert_array_equal(backend.infer(given), expected(given))


@pytest.mark.parametrize("capturable", [True, False])
def test_rtx_records_a_graph_only_where_it_can(capturable: bool, machine: SimpleNamespace, tmp_path: Path) -> None:
    machine.trt.engine.capturable = capturable
    with TensorRTBackend(write_engine(tmp_path, flavor="rtx", gpu=None), lanes=1) as backend:
        for seed in range(3):
            given = frames(1, (8, 12), seed)
            np.testing.assert_array_equal(backend.infer(given), expected(given))
    assert machine.memory.recorded == int(capturable)


def test_a_batch_that_the_gpu_has_no_memory_for_is_said(
    machine: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(size: int) -> None:
        raise RuntimeError("cudaMalloc failed: cudaErrorMemoryAllocation")

    with TensorRTBackend(write_engine(tmp_path)) as backend:
        monkeypatch.setattr(machine.memory, "buffer", no_room)
        with pytest.raises(InputError, match="cudaErrorMemoryAllocation"):
            backend.infer(frames(1, (8, 12)))


def test_a_plan_that_tensorrt_refuses(machine: SimpleNamespace, tmp_path: Path) -> None:
    machine.trt.engine = None
    with pytest.raises(InputError, match=r"said TensorRT.*to_trt.py STUDENT.onnx --fp16"):
        TensorRTBackend(write_engine(tmp_path))


@pytest.mark.parametrize(
    ("changes", "reason"),
    {
        "another version": ({"version": "10.16.1"}, r"built with TensorRT 10.16.1, and 11.4.0 is installed"),
        "another major version": (
            {"version": "10.16.1", "options": {"version_compatible": True}},
            r"built with TensorRT 10.16.1, and 11.4.0 is installed",
        ),
        "another card": (
            {"gpu": Gpu("Orin", "sm87", (12, 6))},
            r"built on Orin \(sm87\), and this is RTX 4090 \(sm89\)",
        ),
        "another target": ({"targets": ("sm86", "sm120"), "gpu": None}, r"built for sm86, sm120, and RTX 4090 is sm89"),
    }.values(),
)
def test_an_engine_of_another_machine(
    changes: dict[str, Any], reason: str, machine: SimpleNamespace, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=reason + r".*Build it again: python export/to_trt.py"):
        TensorRTBackend(write_engine(tmp_path, **changes))


def test_compatible_engines_run_elsewhere_if_they_are_trusted(
    machine: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TensorRTBackend(write_engine(tmp_path, gpu=Gpu("A100", "sm80", (13, 0)), options={"hardware_compatible": True}))
    plan = write_engine(tmp_path, version="11.1.0", options={"version_compatible": True})
    with pytest.raises(InputError, match="AICSD_TRUST=tensorrt-host-code"):
        TensorRTBackend(plan)
    assert not machine.trt.runtime.engine_host_code_allowed
    monkeypatch.setenv("AICSD_TRUST", "tensorrt-host-code")
    TensorRTBackend(plan)
    assert machine.trt.runtime.engine_host_code_allowed
    monkeypatch.delenv("AICSD_TRUST")
    TensorRTBackend(plan, built_here=True)
    assert machine.trt.runtime.engine_host_code_allowed


def cut(plan: Path) -> None:
    plan.write_bytes(plan.read_bytes()[:-7])


def flip(plan: Path) -> None:
    content = bytearray(plan.read_bytes())
    content[40] ^= 1
    plan.write_bytes(content)


def no_card(plan: Path) -> None:
    card_path(plan).unlink()


def deep_card(plan: Path) -> None:
    card_path(plan).write_text("[" * 100_000)


def text_card(plan: Path) -> None:
    card_path(plan).write_text("hello")


def newer_card(plan: Path) -> None:
    value = json.loads(card_path(plan).read_text())
    card_path(plan).write_text(json.dumps(value | {"schema_version": 99}))


def half_card(plan: Path) -> None:
    value = json.loads(card_path(plan).read_text())
    del value["profiles"]
    card_path(plan).write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (cut, "damaged or cut off"),
        (flip, "damaged or cut off"),
        (no_card, "no student.plan.json beside it"),
        (text_card, "is damaged"),
        (deep_card, "is damaged"),
        (newer_card, "newer aicsd-deploy"),
        (half_card, "is damaged"),
    ],
)
def test_a_damaged_engine_never_reaches_tensorrt(
    damage: Any, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = write_engine(tmp_path)
    damage(plan)

    def never(flavor: str) -> None:
        raise AssertionError("TensorRT was touched")

    monkeypatch.setattr(trt_backend, "load_tensorrt", never)
    with pytest.raises(InputError, match=expected):
        open_backend(plan)


def test_the_card_comes_back_as_it_was_written(tmp_path: Path) -> None:
    profiles = (((1, 8, 12), (1, 8, 12), (2, 16, 24)),)
    card = read_card(write_engine(tmp_path, profiles=profiles, targets=("sm86",), float32_nodes={"conv": "large"}))
    assert card.profiles == profiles
    assert card.gpu == RTX_4090
    assert card.metadata.classes == CLASSES
    assert card.float32_nodes == {"conv": "large"}


def test_the_cpu_runs_no_engine(tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match="NVIDIA GPUs only"):
        open_backend(write_engine(tmp_path), device="cpu")


@pytest.mark.parametrize("graph", [True, False])
def test_cuda_python_owns_memory_streams_graphs_and_events(
    graph: bool, machine: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host_cuda = pytest.importorskip("host_cuda", reason="cuda-python is not installed", exc_type=ImportError)
    cuda = host_cuda.HostCuda()
    modules = {"cuda.bindings.runtime": cuda, "cuda.bindings.utils": importlib.import_module("cuda.bindings.utils")}
    monkeypatch.setattr(device_memory, "importlib", SimpleNamespace(import_module=modules.__getitem__))
    memory = open_memory("cuda-python", index=1)
    monkeypatch.setattr(trt_backend, "open_memory", lambda name, index: memory)
    machine.trt.engine.memory = cuda
    cuda.device = 0
    with TensorRTBackend(write_engine(tmp_path), graph=graph, lanes=2) as backend:
        for seed in range(3):
            given = frames(1, (8, 12), seed)
            np.testing.assert_array_equal(backend.infer(given), expected(given))
            assert cuda.device == 0, "the caller's GPU is as it was"
        assert backend.time_stages([given] * 3) == {"host_to_device": 1, "network": 20, "device_to_host": 3}
    del backend
    gc.collect()
    assert not cuda.live, "all is given back"


def test_memory_that_is_not_there_is_said_owner_by_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"no {name}")

    monkeypatch.setattr(device_memory, "importlib", SimpleNamespace(import_module=missing))
    with pytest.raises(MissingDependencyError, match=r"torch: no torch; cuda-python: no cuda.*; pycuda: no pycuda"):
        open_memory()
    with pytest.raises(MissingDependencyError, match=r"\(pycuda: no pycuda"):
        open_memory("pycuda")
