"""GPU memory, streams and copies for engines, owned by PyTorch, by cuda-python or by PyCUDA: whichever a device has."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from aicsd_deploy.errors import MissingDependencyError, first_line
from aicsd_deploy.runtime.base import UInt8Array

OWNERS = ("torch", "cuda-python", "pycuda")


@dataclass(frozen=True)
class Buffer:
    """The same number of bytes on the host, page-locked, and on the GPU.

    Attributes:
        host: uint8 (size,), what is uploaded or was downloaded.
        address: where the GPU's bytes are.
        owners: what keeps both alive.
    """

    host: UInt8Array
    address: int
    owners: tuple[Any, ...]


class DeviceMemory(ABC):
    """What an engine needs of a GPU besides TensorRT; one object serves any number of threads."""

    name: str

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the GPU this thread's own for what is inside."""
        yield

    @abstractmethod
    def stream(self) -> Any:
        """Return a new stream that does not wait for others."""

    @abstractmethod
    def handle(self, stream: Any) -> int:
        """Return the number that TensorRT knows a stream by."""

    @abstractmethod
    def buffer(self, size: int) -> Buffer:
        """Allocate `size` bytes on both sides."""

    @abstractmethod
    def upload(self, buffer: Buffer, stream: Any) -> None:
        """Copy from the host to the GPU, in the stream's order; returns at once."""

    @abstractmethod
    def download(self, buffer: Buffer, stream: Any) -> None:
        """Copy from the GPU to the host, in the stream's order; returns at once."""

    @abstractmethod
    def wait(self, stream: Any) -> None:
        """Wait until a stream has done all it was given."""

    @abstractmethod
    def mark(self, stream: Any) -> Any:
        """Note, in the stream's order, the moment at which the GPU gets there."""

    @abstractmethod
    def milliseconds(self, first: Any, second: Any) -> float:
        """Return the GPU's time between two marks that it has passed."""

    def record(self, stream: Any, work: Callable[[], None]) -> Callable[[], None] | None:
        """Capture what `work` gives to a stream as a CUDA graph; return what replays it, None where there are no graphs."""
        return None


def open_memory(name: str = "auto", *, index: int = 0) -> DeviceMemory:
    """Return an owner of GPU memory.

    Args:
        name: "torch", "cuda-python", "pycuda", or "auto" for the first of them that is installed and works.
        index: the GPU.

    Raises:
        MissingDependencyError: it is not installed, or cannot use the GPU.
    """
    kinds: dict[str, type[Any]] = {"torch": TorchMemory, "cuda-python": CudaPythonMemory, "pycuda": PycudaMemory}
    reasons = []
    for candidate in OWNERS if name == "auto" else (name,):
        try:
            memory: DeviceMemory = kinds[candidate](index)
        except Exception as error:  # a missing module, a missing driver, each library's own errors
            reasons.append(f"{candidate}: {first_line(error)}")
        else:
            return memory
    raise MissingDependencyError(
        f"An engine needs GPU memory from PyTorch, cuda-python or PyCUDA, and none serves here ({'; '.join(reasons)}). Install one: "
        "pip install cuda-python, or 'aicsd-deploy[pycuda]' where the CUDA toolkit is."
    )


class TorchMemory(DeviceMemory):
    """Memory from PyTorch's allocator."""

    name = "torch"

    def __init__(self, index: int) -> None:
        self._torch = importlib.import_module("torch")
        if not self._torch.cuda.is_available():
            raise RuntimeError("this PyTorch can use no GPU")
        self._device = self._torch.device("cuda", index)

    @contextmanager
    def current(self) -> Iterator[None]:
        with self._torch.cuda.device(self._device):
            yield

    def stream(self) -> Any:
        return self._torch.cuda.Stream(self._device)

    def handle(self, stream: Any) -> int:
        return int(stream.cuda_stream)

    def buffer(self, size: int) -> Buffer:
        host = self._torch.empty(size, dtype=self._torch.uint8, pin_memory=True)
        device = self._torch.empty(size, dtype=self._torch.uint8, device=self._device)
        return Buffer(host.numpy(), int(device.data_ptr()), (host, device))

    def upload(self, buffer: Buffer, stream: Any) -> None:
        host, device = buffer.owners
        with self._torch.cuda.stream(stream):
            device.copy_(host, non_blocking=True)

    def download(self, buffer: Buffer, stream: Any) -> None:
        host, device = buffer.owners
        with self._torch.cuda.stream(stream):
            host.copy_(device, non_blocking=True)

    def wait(self, stream: Any) -> None:
        stream.synchronize()

    def mark(self, stream: Any) -> Any:
        event = self._torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    def milliseconds(self, first: Any, second: Any) -> float:
        return float(first.elapsed_time(second))

    def record(self, stream: Any, work: Callable[[], None]) -> Callable[[], None] | None:
        graph = self._torch.cuda.CUDAGraph()
        with self._torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            work()

        def replay() -> None:
            with self._torch.cuda.stream(stream):
                graph.replay()

        return replay


class CudaPythonMemory(DeviceMemory):
    """Memory from NVIDIA's cuda-python, for devices without PyTorch."""

    name = "cuda-python"

    def __init__(self, index: int) -> None:
        self._cuda = importlib.import_module("cuda.bindings.runtime")
        self._native = importlib.import_module("cuda.bindings.utils").get_cuda_native_handle
        self._index = index
        self._call("cudaSetDevice", index)
        self._call("cudaFree", 0)  # makes the context, so that a missing driver is noticed here

    def _call(self, function: str, *arguments: Any) -> Any:
        code, *values = getattr(self._cuda, function)(*arguments)
        if code != self._cuda.cudaError_t.cudaSuccess:
            raise RuntimeError(f"{function} failed: {code.name}")
        return values[0] if len(values) == 1 else None

    @contextmanager
    def current(self) -> Iterator[None]:
        before = self._call("cudaGetDevice")
        self._call("cudaSetDevice", self._index)
        try:
            yield
        finally:
            self._call("cudaSetDevice", before)

    def stream(self) -> Any:
        stream = self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)
        return _Owned(stream, lambda: self._call("cudaStreamDestroy", stream))

    def handle(self, stream: Any) -> int:
        return int(self._native(stream.value))

    def buffer(self, size: int) -> Buffer:
        import ctypes

        host = int(self._call("cudaMallocHost", size))
        device = int(self._call("cudaMalloc", size))
        owners = (
            _Owned(host, lambda: self._call("cudaFreeHost", host)),
            _Owned(device, lambda: self._call("cudaFree", device)),
        )
        view = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(host))
        return Buffer(view, device, owners)

    def upload(self, buffer: Buffer, stream: Any) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        host, device = (owner.value for owner in buffer.owners)
        self._call("cudaMemcpyAsync", device, host, buffer.host.size, kind, stream.value)

    def download(self, buffer: Buffer, stream: Any) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        host, device = (owner.value for owner in buffer.owners)
        self._call("cudaMemcpyAsync", host, device, buffer.host.size, kind, stream.value)

    def wait(self, stream: Any) -> None:
        self._call("cudaStreamSynchronize", stream.value)

    def mark(self, stream: Any) -> Any:
        event = self._call("cudaEventCreate")
        self._call("cudaEventRecord", event, stream.value)
        return _Owned(event, lambda: self._call("cudaEventDestroy", event))

    def milliseconds(self, first: Any, second: Any) -> float:
        return float(self._call("cudaEventElapsedTime", first.value, second.value))

    def record(self, stream: Any, work: Callable[[], None]) -> Callable[[], None] | None:
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream.value, mode)
        try:
            work()
        finally:
            graph = self._call("cudaStreamEndCapture", stream.value)
        executable = self._call("cudaGraphInstantiate", graph, 0)
        self._call("cudaGraphDestroy", graph)
        owner = _Owned(executable, lambda: self._call("cudaGraphExecDestroy", executable))
        return lambda: self._call("cudaGraphLaunch", owner.value, stream.value)


class PycudaMemory(DeviceMemory):
    """Memory from PyCUDA; it has no CUDA graphs, so every frame is given to the GPU call by call."""

    name = "pycuda"

    def __init__(self, index: int) -> None:
        self._cuda = importlib.import_module("pycuda.driver")
        self._cuda.init()
        # The context that TensorRT and everything else in this process uses.
        self._context = self._cuda.Device(index).retain_primary_context()

    @contextmanager
    def current(self) -> Iterator[None]:
        self._context.push()
        try:
            yield
        finally:
            self._cuda.Context.pop()

    def stream(self) -> Any:
        return self._cuda.Stream(1)  # CU_STREAM_NON_BLOCKING: does not wait for what runs in the default stream

    def handle(self, stream: Any) -> int:
        return int(stream.handle)

    def buffer(self, size: int) -> Buffer:
        host = self._cuda.pagelocked_empty(size, np.uint8)
        device = self._cuda.mem_alloc(size)
        return Buffer(host, int(device), (host, device))

    def upload(self, buffer: Buffer, stream: Any) -> None:
        self._cuda.memcpy_htod_async(buffer.address, buffer.host, stream)

    def download(self, buffer: Buffer, stream: Any) -> None:
        self._cuda.memcpy_dtoh_async(buffer.host, buffer.address, stream)

    def wait(self, stream: Any) -> None:
        stream.synchronize()

    def mark(self, stream: Any) -> Any:
        return self._cuda.Event().record(stream)

    def milliseconds(self, first: Any, second: Any) -> float:
        return float(first.time_till(second))


class _Owned:
    """A handle that is given back when nobody uses it any more."""

    def __init__(self, value: Any, release: Callable[[], Any]) -> None:
        self.value = value
        self._release = release

    def __del__(self) -> None:
        try:
            self._release()
        except Exception:  # the process is ending, or the GPU is gone: nothing is left to give back
            return
