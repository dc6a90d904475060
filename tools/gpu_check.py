"""Check and time on a GPU all that this toolkit can run there today, in one call, into gpu_check.json.

    python tools/gpu_check.py --out DIR

Each part stands alone: one that fails is recorded with its error, and the others go on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aicsd_deploy.bench.environment import environment
from aicsd_deploy.bench.latency import Latency, measure_latency
from aicsd_deploy.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from aicsd_deploy.cli import Parser, run, size_hw
from aicsd_deploy.config import DistillConfig, TrainConfig
from aicsd_deploy.console import say
from aicsd_deploy.data.spec import open_dataset
from aicsd_deploy.export.engine import Request, make_engine
from aicsd_deploy.export.gate import Limits
from aicsd_deploy.export.onnx_export import export_onnx
from aicsd_deploy.export.verify import compare, frames_for_comparison
from aicsd_deploy.files import write_json
from aicsd_deploy.metadata import Metadata
from aicsd_deploy.models import build_model
from aicsd_deploy.recipes import distill, train_teacher
from aicsd_deploy.runtime.base import UInt8Array, open_backend
from aicsd_deploy.runtime.device_memory import OWNERS
from aicsd_deploy.runtime.engine_card import read_card
from aicsd_deploy.runtime.tensorrt_module import Flavor, load_tensorrt, logger, require_tensorrt_gpu
from aicsd_deploy.runtime.trt_backend import TensorRTBackend
from aicsd_deploy.tracking import METRICS
from aicsd_deploy.video.overlay import Overlay
from aicsd_deploy.video.pipeline import process_video
from aicsd_deploy.video.sources import SyntheticSource
from aicsd_deploy.video.video_writer import Mp4Sink

REPO = Path(__file__).parents[1]


def make_artifacts(folder: Path, model: str, size: tuple[int, int]) -> tuple[Path, Path]:
    """Write a checkpoint with settled batch statistics and its ONNX file."""
    torch.manual_seed(0)
    dataset = open_dataset("synthetic", "val")
    network = build_model(model, num_classes=len(dataset.classes)).cuda().train()
    with torch.no_grad():
        for _ in range(5):
            network(torch.randn(4, 3, *size, device="cuda"))
    checkpoint = Checkpoint(Metadata(model, dataset.classes, size, data="synthetic"), network.cpu().state_dict())
    save_checkpoint(folder / "check.pt", checkpoint)
    export_onnx(load_checkpoint(folder / "check.pt"), checkpoint.metadata, folder / "check.onnx")
    return folder / "check.pt", folder / "check.onnx"


def parity(reference: Path, candidate: Path, device: str) -> dict[str, Any]:
    """Return how far an artefact on a device agrees with the checkpoint on the CPU."""
    frames = frames_for_comparison(open_dataset("synthetic", "val"), count=16)
    with open_backend(reference, device="cpu") as cpu, open_backend(candidate, device=device) as gpu:
        gpu.metadata = gpu.metadata.replace(dynamic=())
        agreement = compare(cpu, gpu, frames)
        return {"backend": gpu.name, "device": gpu.device, "agreement": agreement.share, "by_class": agreement.by_class}


def latencies(paths: Sequence[Path]) -> dict[str, Any]:
    """Return latencies of artefacts on the GPU, measured in turns."""
    frames = frames_for_comparison(open_dataset("synthetic", "val"), count=16)
    backends = [open_backend(path, device="cuda") for path in paths]
    found: list[Latency] = measure_latency(backends, frames, rounds=60)
    return {
        f"{path.name} {backend.name}": vars(latency)
        for path, backend, latency in zip(paths, backends, found, strict=True)
    }


def engines(folder: Path, onnx: Path, flavor: Flavor) -> dict[str, Any]:
    """Build an engine in each precision on this GPU, compare it with the checkpoint, and time it with every owner of memory."""
    require_tensorrt_gpu(flavor, why="")
    found: dict[str, Any] = {}
    for precision in ("fp32", "fp16", "bf16"):
        plan = folder / f"{flavor}_{precision}.plan"
        try:
            # Random weights have no margin between the classes, so the limits are wide and the figures are what counts.
            request = Request(precision, flavor, reference=folder / "check.pt", limits=Limits(0.5, 100))
            found[precision] = make_engine(onnx, plan, request).gate
        except Exception:
            found[precision] = {"error": traceback.format_exc()}
            continue
        found[precision]["latency"] = {owner: _or_error(partial(engine_times, plan, owner)) for owner in OWNERS}
    return found


def engine_times(plan: Path, owner: str) -> dict[str, Any]:
    """Return milliseconds per frame of the backend and of a bare loop on the same engine, in turns, and whether graphs differ."""
    with TensorRTBackend(plan, memory=owner) as ours, TensorRTBackend(plan, memory=owner, graph=False) as calls:
        frame = np.random.default_rng(0).integers(0, 256, (1, *ours.metadata.image_size_hw, 3), dtype=np.uint8)
        bare = bare_loop(plan, frame)
        times: dict[str, list[float]] = {"backend": [], "backend without graph": [], "bare loop": []}
        same = bool((ours.infer(frame) == calls.infer(frame)).all())
        for _ in range(200):
            for name, work in (("backend", ours.infer), ("backend without graph", calls.infer), ("bare loop", bare)):
                start = time.perf_counter()
                work(frame)
                times[name].append(1000 * (time.perf_counter() - start))
    medians = {name: float(np.median(values[20:])) for name, values in times.items()}
    return {
        "p50_ms": medians,
        "over the bare loop": medians["backend"] / medians["bare loop"],
        "graph changes nothing": same,
    }


def bare_loop(plan: Path, frame: UInt8Array) -> Callable[[UInt8Array], object]:
    """Return the shortest loop somebody would write: pinned copies with PyTorch, one context, one stream, no graph."""
    card = read_card(plan)
    trt = load_tensorrt(card.flavor)
    engine = trt.Runtime(logger(card.flavor)).deserialize_cuda_engine(plan.read_bytes())
    context, stream = engine.create_execution_context(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    host_in, host_out = (
        torch.from_numpy(frame).pin_memory(),
        torch.empty(frame.shape[:3], dtype=torch.uint8, pin_memory=True),
    )
    device_in, device_out = host_in.cuda(), host_out.cuda()
    context.set_input_shape("frames", tuple(frame.shape))
    context.set_tensor_address("frames", device_in.data_ptr())
    context.set_tensor_address("labels", device_out.data_ptr())

    def work(frame_NHWC: UInt8Array) -> object:
        host_in.copy_(torch.from_numpy(frame_NHWC))
        with torch.cuda.stream(stream):
            device_in.copy_(host_in, non_blocking=True)
            context.execute_async_v3(stream.cuda_stream)
            host_out.copy_(device_out, non_blocking=True)
        stream.synchronize()
        return engine, host_out.numpy().copy()

    return work


def _or_error(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception:
        return {"error": traceback.format_exc()}


def video(path: Path) -> dict[str, Any]:
    """Return the speed of the video pipeline on 300 frames of the built-in scene, with one copy of the network and with two."""
    found = {}
    for copies in (1, 2):
        backends = [open_backend(path, device="cuda") for _ in range(copies)]
        metadata = backends[0].metadata
        with tempfile.TemporaryDirectory() as folder, SyntheticSource(metadata.image_size_hw, seconds=12) as source:
            sink = Mp4Sink(Path(folder) / "out.mp4")
            found[f"{copies} in flight"] = process_video(
                source, backends, sink, overlay=Overlay(metadata.classes)
            ).summary()
    return found


def train_a_little(folder: Path) -> dict[str, Any]:
    """Train for one epoch on the GPU and return the summary."""
    config = TrainConfig(model="deeplabv3plus_resnet18", epochs=1, device="cuda", workers=8, image_size=(192, 256))
    summary = train_teacher(config, folder / "run")
    return {key: summary[key] for key in ("miou", "seconds", "images")}


def step_throughput(folder: Path, *flags: str) -> dict[str, Any]:
    """Return what benchmarks/throughput.py measures at full size, in a process of its own."""
    out, program = folder / "throughput.json", REPO / "benchmarks/throughput.py"
    size = ["--image-size", "513x513", "--batch-size", "8", "--rounds", "20", "--device", "cuda"]
    command = [sys.executable, str(program), *size, *flags, "--json", str(out)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(REPO)})
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def busy_share(folder: Path) -> dict[str, Any]:
    """Distil for some 200 steps with cached data; return how busy nvidia-smi saw the GPU between the first and the last line."""
    size = (256, 512)
    teacher = TrainConfig(
        data="synthetic:256x512", model="deeplabv3plus_resnet101", epochs=1, batch_size=16, image_size=size, workers=12
    )
    train_teacher(teacher, folder / "busy-teacher")
    shared = teacher.model_dump() | {"model": "deeplabv3plus_resnet18", "epochs": 5, "val_every": 99}
    config = DistillConfig(**shared, teacher=str(folder / "busy-teacher/best.pt"))
    log = folder / "busy" / METRICS
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"]
    seen: list[tuple[int, int]] = []  # lines in the log, percent

    def watch(lines: Iterable[str]) -> None:
        for line in lines:
            seen.append((len(log.read_text().splitlines()) if log.exists() else 0, int(line)))

    with subprocess.Popen(query, stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None
        thread = threading.Thread(target=watch, args=(watcher.stdout,), daemon=True)
        thread.start()
        try:
            distill(config, folder / "busy")
        finally:
            watcher.terminate()
            thread.join()
    steps = [json.loads(line) for line in log.read_text().splitlines() if "speed" in line]
    inside = [percent for lines, percent in seen if 2 <= lines < len(steps)]
    return {
        "steps": steps[-1]["step"],
        "samples": len(inside),
        "busy_percent": sum(inside) / max(len(inside), 1),
        "last_line": steps[-1],
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for gpu_check.json")
    parser.add_argument("--model", default="deeplabv3plus_resnet18", help="network to check")
    parser.add_argument("--image-size", type=size_hw, default=(512, 1024), metavar="HxW", help="size of its frames")
    args = parser.parse_args(argv)
    result: dict[str, Any] = {"environment": environment(), "model": args.model, "image_size_hw": list(args.image_size)}

    def part(name: str, work: Callable[[], Any]) -> Any:
        say(f"== {name}")
        try:
            result[name] = work()
        except Exception:
            result[name] = {"error": traceback.format_exc()}
        write_json(args.out / "gpu_check.json", result)
        say(str(result[name]))
        return result[name]

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        part("artifacts", lambda: [str(path) for path in make_artifacts(folder, args.model, args.image_size)])
        checkpoint, onnx = folder / "check.pt", folder / "check.onnx"
        part("torch cuda parity", lambda: parity(checkpoint, checkpoint, "cuda"))
        part("onnxruntime cuda parity", lambda: parity(checkpoint, onnx, "cuda"))
        part("torch cuda latency", lambda: latencies([checkpoint]))
        part("side by side latency", lambda: latencies([checkpoint, onnx]))
        part("TensorRT-RTX", lambda: engines(folder, onnx, "rtx"))
        part("TensorRT", lambda: engines(folder, onnx, "tensorrt"))
        plans = sorted(folder.glob("*.plan"))
        part("everything side by side", lambda: latencies([checkpoint, onnx, *plans]))
        part("video", lambda: video(onnx))
        part("training", lambda: train_a_little(folder))
        part("step throughput", lambda: step_throughput(folder))
        part("step throughput, compiled", lambda: step_throughput(folder, "--compile"))
        part("step throughput, float32", lambda: step_throughput(folder, "--precision", "fp32"))
        part("busy while distilling", lambda: busy_share(folder))


if __name__ == "__main__":
    run(main)
