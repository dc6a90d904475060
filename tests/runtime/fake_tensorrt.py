"""TensorRT and a GPU, as far as the backend uses them: an engine that labels a pixel by its blue value, and memory on the host.

Operations on a stream are queued and run when the stream is waited for, so that a missing wait shows. The GPU's clock moves by
1 ms for an upload, 20 for the engine and 3 for a download.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np

from aicsd_deploy.runtime.device_memory import Buffer, DeviceMemory

NUM_CLASSES = 5


class TensorIOMode(Enum):
    INPUT = 0
    OUTPUT = 1


class FakeStream:
    def __init__(self) -> None:
        self.queue: list[Callable[[], None]] = []
        self.recording: list[Callable[[], None]] | None = None

    def give(self, operation: Callable[[], None]) -> None:
        (self.queue if self.recording is None else self.recording).append(operation)


class FakeMemory(DeviceMemory):
    name = "fake"

    def __init__(self) -> None:
        self.streams: list[FakeStream] = []
        self.recorded = 0
        self.is_current = 0
        self.clock_ms = 0.0

    def current(self) -> Any:
        memory = self

        class Current:
            def __enter__(self) -> None:
                memory.is_current += 1

            def __exit__(self, *_: object) -> None:
                memory.is_current -= 1

        return Current()

    def stream(self) -> FakeStream:
        assert self.is_current, "the GPU must be current"
        self.streams.append(FakeStream())
        return self.streams[-1]

    def handle(self, stream: FakeStream) -> int:
        return self.streams.index(stream)

    def buffer(self, size: int) -> Buffer:
        host, device = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
        return Buffer(host, device.ctypes.data, (host, device))

    def upload(self, buffer: Buffer, stream: FakeStream) -> None:
        host, device = buffer.owners
        stream.give(lambda: self.copy(device, host, 1))

    def download(self, buffer: Buffer, stream: FakeStream) -> None:
        host, device = buffer.owners
        stream.give(lambda: self.copy(host, device, 3))

    def wait(self, stream: FakeStream) -> None:
        assert self.is_current, "the GPU must be current"
        operations, stream.queue = stream.queue, []
        for operation in operations:
            operation()

    def copy(self, target: np.ndarray, source: np.ndarray, milliseconds: float) -> None:
        np.copyto(target, source)
        self.pass_ms(milliseconds)

    def pass_ms(self, milliseconds: float) -> None:
        self.clock_ms += milliseconds

    def mark(self, stream: FakeStream) -> list[float]:
        passed: list[float] = []
        stream.give(lambda: passed.append(self.clock_ms))
        return passed

    def milliseconds(self, first: list[float], second: list[float]) -> float:
        (a,), (b,) = first, second
        return b - a

    def record(self, stream: FakeStream, work: Callable[[], None]) -> Callable[[], None]:
        assert not stream.queue, "a graph is recorded on a stream that has nothing left to do"
        stream.recording = []
        work()
        operations, stream.recording = stream.recording, None
        self.recorded += 1
        return lambda: stream.queue.extend(operations)


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.shape: tuple[int, ...] = ()
        self.shapes: list[tuple[int, ...]] = []
        self.addresses: dict[str, int] = {}
        self.profile = 0

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        if self.engine.refuses == "profile":
            return False
        self.profile = profile
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return self.engine.capturable

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name == "frames"
        self.shape = tuple(shape)
        self.shapes.append(self.shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape[:3] if name == "labels" else self.shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return self.engine.refuses != "memory"

    def execute_async_v3(self, stream: int) -> bool:
        self.engine.enqueued += 1
        shape, addresses = self.shape, dict(self.addresses)

        def compute() -> None:
            count = int(np.prod(shape))
            frames = np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(addresses["frames"])).reshape(shape)
            labels = np.ctypeslib.as_array((ctypes.c_uint8 * (count // 3)).from_address(addresses["labels"]))
            labels[:] = (frames[..., 0] % NUM_CLASSES).reshape(-1)
            self.engine.memory.pass_ms(20)

        self.engine.memory.streams[stream].give(compute)
        return not self.engine.fails


class FakeEngine:
    num_io_tensors = 2

    def __init__(self, memory: FakeMemory) -> None:
        self.memory = memory
        self.enqueued = 0
        self.fails = False
        self.refuses = ""  # "profile" or "memory"
        self.capturable = True
        self.contexts: list[FakeContext] = []

    def get_tensor_name(self, i: int) -> str:
        return ("frames", "labels")[i]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name == "frames" else TensorIOMode.OUTPUT

    def create_runtime_config(self) -> Any:
        return SimpleNamespace()

    def create_execution_context(self, config: Any = None) -> FakeContext:
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]


def fake_tensorrt(memory: FakeMemory, version: str = "11.4.0") -> Any:
    """Return a module `tensorrt`; its `engine` is what every plan holds, None for one that cannot be loaded."""
    module = SimpleNamespace(__version__=version, TensorIOMode=TensorIOMode, engine=FakeEngine(memory))
    module.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER=1)
    module.logger = SimpleNamespace(messages=[])

    class Runtime:
        def __init__(self, logger: object) -> None:
            self.engine_host_code_allowed = False
            module.runtime = self

        def deserialize_cuda_engine(self, plan: bytes) -> FakeEngine | None:
            if module.engine is None:
                module.logger.messages.append("said TensorRT")
            return module.engine

    module.Runtime = Runtime
    return module
