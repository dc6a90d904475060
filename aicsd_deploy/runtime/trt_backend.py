"""Runs a TensorRT or TensorRT-RTX engine on an NVIDIA GPU."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from aicsd_deploy.errors import AicsdError, InputError, first_line
from aicsd_deploy.metadata import TRUST_VARIABLE, is_trusted
from aicsd_deploy.runtime.base import STAGES, Backend, UInt8Array, median_stages
from aicsd_deploy.runtime.device_memory import Buffer, DeviceMemory, open_memory
from aicsd_deploy.runtime.engine_card import EngineCard, holds, read_card, require_gpu_device
from aicsd_deploy.runtime.tensorrt_module import NAMES, load_tensorrt, logger, require_tensorrt_gpu

HOST_CODE = "tensorrt-host-code"
"""What AICSD_TRUST names to have version-compatible engines loaded, which carry code for the CPU."""
_STAGES = (STAGES[0], STAGES[2], STAGES[4])
"""What an engine's time can be split into: upload, engine, download."""
_PREPARING = threading.Lock()
"""Held while a lane gets ready: to record a CUDA graph PyTorch waits for the whole GPU, which breaks what another records."""


class TensorRTBackend(Backend):
    """An engine, ready for calls from any number of threads.

    Each of its lanes has an execution context, a stream and page-locked memory of its own, so that one frame is uploaded while
    another computes and a third is downloaded. A lane captures upload, engine and download once as a CUDA graph and replays it.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str = "auto",
        memory: str = "auto",
        lanes: int = 2,
        graph: bool = True,
        built_here: bool = False,
    ) -> None:
        """Load an engine; see `open_backend`.

        Args:
            path: the .plan; its .plan.json lies beside it.
            device: "auto", "cuda" or "cuda:N".
            memory: who owns the GPU's memory; see `open_memory`.
            lanes: how many calls run at once; each takes memory of its own.
            graph: replay a CUDA graph instead of giving the GPU every kernel anew.
            built_here: this very process built it, so that what it carries for the CPU may run.
        """
        card = read_card(path)
        index = require_gpu_device(device, path)
        gpu = require_tensorrt_gpu(card.flavor, why=f"{path} is a TensorRT engine.", index=index)
        trt = load_tensorrt(card.flavor)
        card.require_fit(path, gpu=gpu, version=str(trt.__version__))
        self.metadata = card.metadata
        self.device = f"cuda:{index}"
        self._memory = open_memory(memory, index=index)
        self.name = f"{NAMES[card.flavor]} {card.metadata.precision} ({self._memory.name})"
        with self._memory.current():
            self._runtime = trt.Runtime(logger(card.flavor))
            self._engine = _deserialize(trt, self._runtime, path, card, trusted=built_here or is_trusted(HOST_CODE))
            # Last in, first out: who calls from one thread always gets the lane that is ready for his frames.
            self._lanes: queue.LifoQueue[_Lane] = queue.LifoQueue()
            for _ in range(lanes):
                self._lanes.put(_Lane(trt, self._engine, self._memory, card, graph))
        self.concurrency = lanes
        self._profiles = card.profiles

    def infer(self, frames_NHWC: UInt8Array) -> UInt8Array:
        self.check_frames(frames_NHWC)
        step = self._largest_batch(frames_NHWC.shape)
        if frames_NHWC.shape[0] > step:
            return np.concatenate([self.infer(frames_NHWC[i : i + step]) for i in range(0, frames_NHWC.shape[0], step)])
        lane = self._lanes.get()
        try:
            with self._memory.current():
                return lane.infer(frames_NHWC)
        finally:
            self._lanes.put(lane)

    def _largest_batch(self, shape_NHWC: tuple[int, ...]) -> int:
        """Return how many of these frames the engine takes at once; all of them where no profile says."""
        count, height, width, _ = shape_NHWC
        most = [min(count, profile[2][0]) for profile in self._profiles]
        fitting = [n for n, profile in zip(most, self._profiles, strict=True) if holds(profile, (n, height, width))]
        return max(fitting, default=count)

    def time_stages(self, batches_NHWC: Sequence[UInt8Array]) -> dict[str, float]:
        """Return what CUDA events tell; an engine is one piece, so all that it computes counts as the network."""
        lane = self._lanes.get()
        try:
            with self._memory.current():
                runs = [lane.time_once(batch) for batch in batches_NHWC]
        finally:
            self._lanes.put(lane)
        return median_stages(runs)

    def close(self) -> None:
        """Give the GPU's memory back; calls that are running end first."""
        with self._memory.current():
            for _ in range(self.concurrency):
                self._lanes.get().close()
            self.concurrency = 0
            # TensorRT wants its objects gone in this order.
            self._engine = None
            self._runtime = None


@dataclass(frozen=True)
class _Ready:
    """What a lane holds for frames of one shape: views of its page-locked memory, and the calls that do the work."""

    frames_NHWC: UInt8Array
    labels_NHW: UInt8Array
    buffers: tuple[Buffer, Buffer]
    parts: tuple[Callable[[], None], ...]
    replay: Callable[[], None]


class _Lane:
    """One execution context with its stream, its buffers and the graph of its last shape."""

    def __init__(self, trt: Any, engine: Any, memory: DeviceMemory, card: EngineCard, graph: bool) -> None:
        self._memory, self._card, self._graph = memory, card, graph
        self._context = _context(trt, engine, card)
        if self._context is None:
            raise InputError(
                f"The GPU has no memory left for another execution context: {' '.join(logger(card.flavor).messages)}"
            )
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        (self._input,) = (n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT)
        (self._output,) = (n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT)
        self._stream = memory.stream()
        self._profile = 0
        self._ready: _Ready | None = None

    def infer(self, frames_NHWC: UInt8Array) -> UInt8Array:
        ready = self._filled(frames_NHWC)
        ready.replay()
        self._memory.wait(self._stream)
        return np.copy(ready.labels_NHW)

    def time_once(self, frames_NHWC: UInt8Array) -> dict[str, float]:
        """Return the milliseconds of each of _STAGES, given to the GPU one by one and not as a graph."""
        ready = self._filled(frames_NHWC)
        marks = [self._memory.mark(self._stream)]
        for part in ready.parts:
            part()
            marks.append(self._memory.mark(self._stream))
        self._memory.wait(self._stream)
        return {name: self._memory.milliseconds(a, b) for name, (a, b) in zip(_STAGES, pairwise(marks), strict=True)}

    def close(self) -> None:
        self._memory.wait(self._stream)
        self._ready = None
        self._context = None

    def _filled(self, frames_NHWC: UInt8Array) -> _Ready:
        if self._ready is None or self._ready.frames_NHWC.shape != frames_NHWC.shape:
            with _PREPARING:
                self._ready = None  # until the new shape works
                try:
                    self._ready = self._prepare(frames_NHWC.shape)
                except AicsdError:
                    raise
                except Exception as error:  # TensorRT's and each owner's own: mostly, too little memory
                    raise InputError(
                        f"The GPU cannot run frames of shape {frames_NHWC.shape}: {first_line(error)}. Give it fewer or smaller ones."
                    ) from error
        np.copyto(self._ready.frames_NHWC, frames_NHWC)
        return self._ready

    def _prepare(self, shape_NHWC: tuple[int, ...]) -> _Ready:
        """Choose the profile, make the buffers, run once so that the kernels settle, and record the graph."""
        profile = self._profile_for(shape_NHWC)
        if profile != self._profile:
            if not self._context.set_optimization_profile_async(profile, self._memory.handle(self._stream)):
                raise RuntimeError(f"TensorRT could not change to its optimization profile {profile}")
            self._profile = profile
        if not self._context.set_input_shape(self._input, shape_NHWC):
            raise InputError(
                f"The engine does not take frames of shape {shape_NHWC}. Resize them, or build it again with a --profile that does."
            )
        labels_shape = tuple(self._context.get_tensor_shape(self._output))
        frames = self._memory.buffer(int(np.prod(shape_NHWC)))
        labels = self._memory.buffer(int(np.prod(labels_shape)))
        for name, buffer in ((self._input, frames), (self._output, labels)):
            if not self._context.set_tensor_address(name, buffer.address):
                raise RuntimeError(f"TensorRT did not take the memory for {name}")

        def execute() -> None:
            if not self._context.execute_async_v3(self._memory.handle(self._stream)):
                raise RuntimeError("TensorRT could not start the engine")

        parts: tuple[Callable[[], None], ...] = (
            lambda: self._memory.upload(frames, self._stream),
            execute,
            lambda: self._memory.download(labels, self._stream),
        )

        def work() -> None:
            for part in parts:
                part()

        work()
        self._memory.wait(self._stream)
        replay = self._memory.record(self._stream, work) if self._graph and self._capturable() else None
        views = frames.host.reshape(shape_NHWC), labels.host.reshape(labels_shape)
        return _Ready(*views, (frames, labels), parts, replay or work)

    def _capturable(self) -> bool:
        # TensorRT itself does not say; it cannot only for operations that no segmentation network has.
        return self._card.flavor == "tensorrt" or self._context.is_stream_capturable(self._memory.handle(self._stream))

    def _profile_for(self, shape_NHWC: tuple[int, ...]) -> int:
        for number, profile in enumerate(self._card.profiles):
            if holds(profile, shape_NHWC[:3]):
                return number
        if not self._card.profiles:
            return 0
        ranges = "; ".join(f"{'x'.join(map(str, p[0]))} to {'x'.join(map(str, p[2]))}" for p in self._card.profiles)
        raise InputError(
            f"The engine was built for frames of NxHxW {ranges}, not {'x'.join(map(str, shape_NHWC[:3]))}. Resize them, or "
            "build it again with another --profile."
        )


def _context(trt: Any, engine: Any, card: EngineCard) -> Any:
    if card.flavor == "tensorrt":
        return engine.create_execution_context()
    config = engine.create_runtime_config()
    # Kernels for a shape are compiled when the shape first comes, not later behind the back of a recorded graph.
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    return engine.create_execution_context(config)


def _deserialize(trt: Any, runtime: Any, path: Path, card: EngineCard, *, trusted: bool) -> Any:
    if card.options.get("version_compatible"):
        if not trusted:
            raise InputError(
                f"{path} is version-compatible, so it carries code that runs on the CPU. If you built it yourself, allow it: "
                f"{TRUST_VARIABLE}={HOST_CODE}"
            )
        runtime.engine_host_code_allowed = True
    messages = logger(card.flavor).messages
    messages.clear()
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise InputError(
            f"{NAMES[card.flavor]} {trt.__version__} cannot load {path}: {' '.join(messages) or 'it gave no reason'}. Build it again "
            f"on this machine: {card.rebuild_command}"
        )
    return engine
