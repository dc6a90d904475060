"""CUDA's runtime as far as `CudaPythonMemory` uses it, with the GPU's memory on the host.

Every call must fit the signature of the real binding. Operations on a stream are queued and run when it is waited for, so that
a missing wait shows.
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable
from itertools import count
from types import SimpleNamespace
from typing import Any

from cuda.bindings import runtime as real

Operation = Callable[[], None]


class HostCuda:
    """Stands for the module `cuda.bindings.runtime`; its `streams` and `pass_ms` are what a fake engine needs."""

    def __init__(self) -> None:
        self.device = 0
        self.clock_ms = 0.0
        self.live: dict[int, Any] = {}
        self.streams: dict[int, SimpleNamespace] = {}
        self._handles = count(1)

    def __getattr__(self, name: str) -> Any:
        work = getattr(type(self), f"_{name}", None)
        if work is None:
            return getattr(real, name)  # enums and constants

        def call(*arguments: Any) -> tuple[Any, ...]:
            inspect.signature(getattr(real, name)).bind(*arguments)
            value = work(self, *arguments)
            return (real.cudaError_t.cudaSuccess,) if value is None else (real.cudaError_t.cudaSuccess, value)

        return call

    def pass_ms(self, milliseconds: float) -> None:
        self.clock_ms += milliseconds

    def _keep(self, value: Any) -> int:
        handle = next(self._handles)
        self.live[handle] = value
        return handle

    def _cudaGetDevice(self) -> int:
        return self.device

    def _cudaSetDevice(self, index: int) -> None:
        self.device = index

    def _cudaMalloc(self, size: int) -> int:
        memory = ctypes.create_string_buffer(size)
        self.live[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    _cudaMallocHost = _cudaMalloc

    def _cudaFree(self, address: int) -> None:
        if address:
            del self.live[address]

    _cudaFreeHost = _cudaFree

    def _cudaStreamCreateWithFlags(self, flags: int) -> Any:
        assert flags == real.cudaStreamNonBlocking
        stream = SimpleNamespace(queue=[], recording=None)
        stream.give = lambda operation: (stream.queue if stream.recording is None else stream.recording).append(
            operation
        )
        handle = self._keep(stream)
        self.streams[handle] = stream
        return real.cudaStream_t(handle)

    def _cudaStreamDestroy(self, stream: Any) -> None:
        del self.live[int(stream)]

    def _cudaMemcpyAsync(self, to: int, source: int, size: int, kind: Any, stream: Any) -> None:
        upload = kind == real.cudaMemcpyKind.cudaMemcpyHostToDevice
        assert upload or kind == real.cudaMemcpyKind.cudaMemcpyDeviceToHost

        def copy() -> None:
            ctypes.memmove(to, source, size)
            self.pass_ms(1 if upload else 3)

        self.streams[int(stream)].give(copy)

    def _cudaStreamSynchronize(self, stream: Any) -> None:
        waiting = self.streams[int(stream)]
        operations, waiting.queue = waiting.queue, []
        for operation in operations:
            operation()

    def _cudaEventCreate(self) -> Any:
        return real.cudaEvent_t(self._keep([]))

    def _cudaEventRecord(self, event: Any, stream: Any) -> None:
        self.streams[int(stream)].give(lambda: self.live[int(event)].append(self.clock_ms))

    def _cudaEventElapsedTime(self, first: Any, second: Any) -> float:
        return float(self.live[int(second)][-1] - self.live[int(first)][-1])

    def _cudaEventDestroy(self, event: Any) -> None:
        del self.live[int(event)]

    def _cudaStreamBeginCapture(self, stream: Any, mode: Any) -> None:
        assert mode == real.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.streams[int(stream)].recording = []

    def _cudaStreamEndCapture(self, stream: Any) -> Any:
        recorded, self.streams[int(stream)].recording = self.streams[int(stream)].recording, None
        return real.cudaGraph_t(self._keep(recorded))

    def _cudaGraphInstantiate(self, graph: Any, flags: int) -> Any:
        return real.cudaGraphExec_t(self._keep(list(self.live[int(graph)])))

    def _cudaGraphDestroy(self, graph: Any) -> None:
        del self.live[int(graph)]

    def _cudaGraphLaunch(self, executable: Any, stream: Any) -> None:
        self.streams[int(stream)].queue.extend(self.live[int(executable)])

    def _cudaGraphExecDestroy(self, executable: Any) -> None:
        del self.live[int(executable)]
