"""Check and time on a GPU all that this toolkit can run there today, into gpu_check.json.

    python tools/gpu_check.py --out DIR
    python tools/gpu_check.py --out DIR --only "TensorRT-RTX" "side by side latency"

Each part runs in a process of its own: one that fails, crashes or hangs is recorded with its error, and the others go on.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aicsd_deploy.bench.environment import environment
from aicsd_deploy.bench.latency import Latency, measure_latency
from aicsd_deploy.checkpoint import Checkpoint, save_checkpoint
from aicsd_deploy.cli import Parser, run, size_hw
from aicsd_deploy.config import DistillConfig, TrainConfig
from aicsd_deploy.console import say
from aicsd_deploy.data.spec import open_dataset
from aicsd_deploy.errors import AicsdError
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
from aicsd_deploy.video.sources import Frame, SyntheticSource
from aicsd_deploy.video.video_writer import Mp4Sink

REPO = Path(__file__).parents[1]
CHECKPOINT, ONNX = "check.pt", "check.onnx"
LIMIT_S = 240
"""So long a part may take; one that hangs must not take the time of the others."""


def make_artifacts(folder: Path, model: str, size: tuple[int, int]) -> list[str]:
    """Write a checkpoint with settled batch statistics and its ONNX file; return their names."""
    torch.manual_seed(0)
    dataset = open_dataset("synthetic", "val")
    network = build_model(model, num_classes=len(dataset.classes)).cuda().train()
    with torch.no_grad():
        for _ in range(5):
            network(torch.randn(4, 3, *size, device="cuda"))
    checkpoint = Checkpoint(Metadata(model, dataset.classes, size, data="synthetic"), network.cpu().state_dict())
    save_checkpoint(folder / CHECKPOINT, checkpoint)
    export_onnx(network.eval(), checkpoint.metadata, folder / ONNX)
    return [CHECKPOINT, ONNX]


def parity(folder: Path, candidate: str) -> dict[str, Any]:
    """Return how far an artefact on the GPU agrees with the checkpoint on the CPU."""
    frames = frames_for_comparison(open_dataset("synthetic", "val"), count=16)
    with (
        open_backend(folder / CHECKPOINT, device="cpu") as cpu,
        open_backend(folder / candidate, device="cuda") as gpu,
    ):
        gpu.metadata = gpu.metadata.replace(dynamic=())
        agreement = compare(cpu, gpu, frames)
        return {"backend": gpu.name, "device": gpu.device, "agreement": agreement.share, "by_class": agreement.by_class}


def latencies(folder: Path) -> dict[str, Any]:
    """Return latencies of all artefacts that run on the GPU here, measured in turns; of the others, why they do not."""
    frames = frames_for_comparison(open_dataset("synthetic", "val"), count=16)
    result: dict[str, Any] = {}
    with ExitStack() as stack:
        opened = {}
        for path in [folder / CHECKPOINT, folder / ONNX, *sorted(folder.glob("*.plan"))]:
            try:
                opened[path.name] = stack.enter_context(open_backend(path, device="cuda"))
            except AicsdError as error:
                result[path.name] = {"error": str(error)}
        found: list[Latency] = measure_latency(list(opened.values()), frames, rounds=60)
        for (name, backend), latency in zip(opened.items(), found, strict=True):
            result[f"{name} {backend.name}"] = vars(latency)
    return result


def engines(folder: Path, flavor: Flavor) -> dict[str, Any]:
    """Build an engine in each precision on this GPU, compare it with the checkpoint, and time it with every owner of memory."""
    require_tensorrt_gpu(flavor, why="")
    load_tensorrt(flavor)
    found: dict[str, Any] = {}
    for precision in ("fp32", "fp16", "bf16"):
        plan = folder / f"{flavor}_{precision}.plan"
        try:
            # Random weights have no margin between the classes, so the limits are wide and the figures are what counts.
            request = Request(precision, flavor, reference=folder / CHECKPOINT, limits=Limits(0.5, 1))
            found[precision] = make_engine(folder / ONNX, plan, request).gate
        except Exception:
            found[precision] = {"error": traceback.format_exc()}
            continue
        found[precision]["latency"] = {owner: _or_error(partial(engine_times, plan, owner)) for owner in OWNERS}
    return found


def engine_times(plan: Path, owner: str) -> dict[str, Any]:
    """Return milliseconds per frame of the backend and of a bare loop on the same engine, in turns, and whether graphs differ."""
    with (
        TensorRTBackend(plan, memory=owner, lanes=1) as ours,
        TensorRTBackend(plan, memory=owner, lanes=1, graph=False) as calls,
    ):
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


class Drawn(SyntheticSource):
    """Twelve seconds of the built-in scene, one second drawn beforehand: to draw a frame takes longer than to label it."""

    def __init__(self, size_hw: tuple[int, int]) -> None:
        super().__init__(size_hw, seconds=12)
        self._frames = list(SyntheticSource(size_hw, seconds=1))

    def __iter__(self) -> Iterator[Frame]:
        for index in range(300):
            frame = self._frames[index % len(self._frames)]
            yield replace(frame, index=index, time_s=float(index / self.fps), image_bgr=frame.image_bgr.copy())


def video(folder: Path) -> dict[str, Any]:
    """Return the speed of the video pipeline on 300 frames of the built-in scene, with one copy of a network and with two."""
    found: dict[str, Any] = {}
    for path in [folder / CHECKPOINT, *sorted(folder.glob("*_fp16.plan"))]:
        for copies in (1, 2):
            with ExitStack() as stack:
                backends = [stack.enter_context(open_backend(path, device="cuda")) for _ in range(copies)]
                metadata = backends[0].metadata
                source = stack.enter_context(Drawn(metadata.image_size_hw))
                sink, overlay = Mp4Sink(folder / "out.mp4"), Overlay(metadata.classes)
                result = process_video(source, backends, sink, overlay=overlay).summary()
            found[f"{path.name}, {copies} in flight"] = result
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
    # What was unpacked for this Python must be found by the other one too.
    known = os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": known})
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


PARTS: dict[str, Callable[[Path], Any]] = {
    "torch cuda parity": lambda folder: parity(folder, CHECKPOINT),
    "onnxruntime cuda parity": lambda folder: parity(folder, ONNX),
    "TensorRT-RTX": lambda folder: engines(folder, "rtx"),
    "TensorRT": lambda folder: engines(folder, "tensorrt"),
    "side by side latency": latencies,
    "step throughput": step_throughput,
    "step throughput, compiled": lambda folder: step_throughput(folder, "--compile"),
    "step throughput, float32": lambda folder: step_throughput(folder, "--precision", "fp32"),
    "busy while distilling": busy_share,
    "training": train_a_little,
    "video": video,
}
"""Most valuable first; the engines that one makes are there for those that follow."""


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `work` returns in a process of its own, or its error."""
    spawn = multiprocessing.get_context("spawn")  # a GPU that this process uses could not be used after a fork
    with tempfile.TemporaryDirectory() as name:
        answer = Path(name) / "answer.json"
        process = spawn.Process(target=_answer, args=(answer, work, arguments))
        process.start()
        try:
            process.join(LIMIT_S)
        finally:
            in_time = not process.is_alive()
            if not in_time and process.pid is not None:
                process.kill()  # where it is still starting it leads no group
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with its workers
                process.join()
        if not in_time:
            return {"error": f"not done after {LIMIT_S} s"}
        if not answer.exists():
            return {"error": f"the process ended with code {process.exitcode}"}
        return json.loads(answer.read_text())


def _answer(answer: Path, work: Callable[..., Any], arguments: Sequence[Any]) -> None:
    os.setpgrp()
    write_json(answer, _or_error(partial(work, *arguments)))


def _part(name: str, folder: Path) -> Any:
    """Run a part by its name, which can be handed to another process as its lambda cannot."""
    return PARTS[name](folder)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for gpu_check.json")
    parser.add_argument("--model", default="deeplabv3plus_resnet18", help="network to check")
    parser.add_argument("--image-size", type=size_hw, default=(512, 1024), metavar="HxW", help="size of its frames")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="run these parts")
    args = parser.parse_args(argv)
    result: dict[str, Any] = {"environment": environment(), "model": args.model, "image_size_hw": list(args.image_size)}

    def note(name: str, work: Callable[..., Any], *arguments: Any) -> None:
        say(f"== {name}")
        start = time.monotonic()
        result[name] = alone(work, *arguments)
        result.setdefault("seconds", {})[name] = round(time.monotonic() - start, 1)
        write_json(args.out / "gpu_check.json", result)
        say(json.dumps(result[name])[:3000])

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        note("artifacts", make_artifacts, folder, args.model, args.image_size)
        for part in args.only:
            note(part, _part, part, folder)


if __name__ == "__main__":
    run(main)
