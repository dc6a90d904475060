"""An ONNX graph as a TensorRT or TensorRT-RTX engine: strongly typed, so that its precision is the graph's."""

from __future__ import annotations

import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import onnx

from aicsd_deploy.console import Advance, progress
from aicsd_deploy.errors import InputError, MissingDependencyError
from aicsd_deploy.files import atomic_path
from aicsd_deploy.runtime.tensorrt_module import NAMES, Flavor, load_tensorrt, logger

Shape = tuple[int, int, int]
Profile = tuple[Shape, Shape, Shape]
"""Smallest, most usual and largest (batch, height, width) that an engine is built for."""


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is built; None and False leave it to TensorRT.

    Attributes:
        profiles: one or more ranges of input shapes; needed where the graph is dynamic, empty where it is not.
        targets: cards ("sm86", …) to build for, TensorRT-RTX only; empty means every card from Ampere on.
        tf32: let float32 layers compute in TF32, with 10 bits of mantissa instead of 23.
        workspace_mib: scratch memory the engine may use.
        optimization_level: 0 (quick build) to 5 (search longest); TensorRT's default is 3.
        timing_cache: file of measured kernel timings, read where it exists and updated.
        hardware_compatible: also run on other cards from Ampere on, at some cost in speed; TensorRT only.
        version_compatible: also run in newer versions of the same major TensorRT; TensorRT only.
        dla_core: run on this deep-learning accelerator of a Jetson, the GPU taking what it cannot; TensorRT only.
    """

    profiles: tuple[Profile, ...] = ()
    targets: tuple[str, ...] = ()
    tf32: bool = False
    workspace_mib: int | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None
    hardware_compatible: bool = False
    version_compatible: bool = False
    dla_core: int | None = None


@dataclass(frozen=True)
class PrecisionFound:
    """What a built network computes in, read back from TensorRT.

    Attributes:
        weighted_layers: number of convolutions and matrix products by the type they compute in.
        weights: number of their weights by the type they are stored in.
        layers: number of layers by the type of their first output.
        exceptions: the weighted layers that do not compute in the most frequent type.
    """

    weighted_layers: dict[str, int]
    weights: dict[str, int]
    layers: dict[str, int]
    exceptions: tuple[str, ...]

    def share(self, precision: str) -> float:
        """Return the part of all weights that is stored in a precision, 0 to 1."""
        return self.weights.get(precision, 0) / max(1, sum(self.weights.values()))


@dataclass(frozen=True)
class Engine:
    """A built engine, what it computes in, and the version of the TensorRT that built it."""

    plan: bytes
    precision: PrecisionFound
    version: str


_TYPES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "INT8": "int8", "FP8": "fp8"}
_QUANTISED = ("int8", "fp8")


def refuse_unfit_options(flavor: Flavor, options: BuildOptions) -> None:
    """Raise InputError for an option that a flavor does not have, or that cannot be meant."""
    if options.workspace_mib is not None and options.workspace_mib > 1 << 20:
        raise InputError(
            f"--workspace {options.workspace_mib}: it is in MiB, so no card has that much; 4096 are 4 GiB."
        )
    if flavor == "tensorrt" and options.targets:
        raise InputError(
            "--target is for --flavor rtx. TensorRT builds for the GPU of the machine it runs on; --hardware-compatible lets the "
            "engine run on other cards from Ampere on."
        )
    if flavor == "tensorrt":
        return
    known = sorted(name.lower() for name in dir(load_tensorrt("rtx").ComputeCapability) if re.fullmatch(r"SM\d+", name))
    unknown = [target for target in options.targets if target not in known]
    if unknown:
        raise InputError(
            f"--target {unknown[0]}: TensorRT-RTX builds for {', '.join(known)} (sm86 is RTX 30, sm89 RTX 40, sm120 RTX 50)."
        )
    for name, given, instead in (
        ("--version-compatible", options.version_compatible, "build again after an update"),
        (
            "--hardware-compatible",
            options.hardware_compatible,
            "give --target, or nothing for every card from Ampere on",
        ),
        ("--dla", options.dla_core is not None, "only Jetsons have one: use --flavor tensorrt there"),
        ("--timing-cache", options.timing_cache is not None, "it times nothing when it builds"),
    ):
        if given:
            raise InputError(f"{name} is not for TensorRT-RTX: {instead}.")


def build_engine(model: onnx.ModelProto, flavor: Flavor, options: BuildOptions) -> Engine:
    """Build an engine from a graph.

    Args:
        model: the graph in the precision that it is to run in; one input (N, H, W, 3).
        flavor: TensorRT (needs the GPU that the engine will run on) or TensorRT-RTX (needs none).
        options: see `BuildOptions`.

    Raises:
        InputError: TensorRT cannot parse or build the graph, or an option does not fit the flavor or this machine.
        MissingDependencyError: the flavor is not installed, or its builder does not start.
    """
    trt = load_tensorrt(flavor)
    refuse_unfit_options(flavor, options)
    messages = logger(flavor).messages
    messages.clear()
    try:
        builder = trt.Builder(logger(flavor))
    except TypeError as error:
        raise MissingDependencyError(
            f"{NAMES[flavor]} {trt.__version__} cannot start its builder here: {' '.join(messages) or error}. Its libraries and the "
            "driver do not fit each other; compare them with NVIDIA's support matrix."
        ) from error
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger(flavor))
    if not parser.parse(model.SerializeToString()):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        reasons = "; ".join(dict.fromkeys(f"{e.node_name() or 'graph'}: {e.desc()}" for e in errors))
        raise InputError(f"{NAMES[flavor]} {trt.__version__} cannot take this graph: {reasons}")
    precision = read_precision(trt, network)
    config = _config(trt, builder, network, options)
    if flavor == "rtx":
        # Without it an engine may allocate memory while it runs, which a CUDA graph cannot record.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    with ExitStack() as stack:
        # One bar for the outermost phase; TensorRT nests dozens in it.
        monitor = _monitor(trt, stack, f"building with {NAMES[flavor]}")
        config.progress_monitor = monitor
        with _interruptible(monitor):
            plan = builder.build_serialized_network(network, config)
    # A profile that contradicts itself is only warned about, and the engine is wrong (seen with pooling to fixed sizes).
    contradictions = [message for message in messages if "not self-consistent" in message]
    if plan is None or contradictions:
        reason = " ".join(contradictions or list(messages)[-3:]) or "it gave no reason"
        raise InputError(f"{NAMES[flavor]} {trt.__version__} cannot build this engine: {reason}")
    if options.timing_cache is not None:
        with atomic_path(options.timing_cache) as temporary:
            temporary.write_bytes(bytes(config.get_timing_cache().serialize()))
    return Engine(bytes(plan), precision, str(trt.__version__))


def read_precision(trt: Any, network: Any) -> PrecisionFound:
    """Read from a strongly typed network, whose types are the engine's, what its layers compute in."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    made_by = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}
    weighted: dict[str, str] = {}
    weights: Counter[str] = Counter()
    for layer in layers:
        if layer.type not in (trt.LayerType.CONVOLUTION, trt.LayerType.DECONVOLUTION, trt.LayerType.MATRIX_MULTIPLY):
            continue
        # The weights are the layer's own, or come from a constant through what quantised or cast it.
        source = _stored(trt, layer.get_input(1), made_by) if layer.num_inputs > 1 else None
        if source is None and layer.type == trt.LayerType.MATRIX_MULTIPLY:
            continue  # a product of two activations, as in attention
        count, stored = source if source else _own_kernel(trt, layer)
        kind = _computes_in(trt, layer.get_input(0), made_by)
        if kind in _QUANTISED and stored not in _QUANTISED:  # both or neither: TensorRT then dequantises first
            kind = _name(layer.get_input(0).dtype)
        weighted[layer.name] = kind
        weights[stored] += count
    by_type = Counter(weighted.values())
    usual = by_type.most_common(1)[0][0] if by_type else ""
    outputs = Counter(_name(layer.get_output(0).dtype) for layer in layers if layer.num_outputs)
    return PrecisionFound(
        dict(by_type), dict(weights), dict(outputs), tuple(name for name, kind in weighted.items() if kind != usual)
    )


def _own_kernel(trt: Any, layer: Any) -> tuple[int, str]:
    """Return the size and the type of the weights that a convolution holds itself: in a strongly typed network, that of its input."""
    # A network gives every layer as a plain ILayer, which has no kernel; NVIDIA's own code casts it so too.
    convolution = layer
    convolution.__class__ = (
        trt.IConvolutionLayer if layer.type == trt.LayerType.CONVOLUTION else trt.IDeconvolutionLayer
    )
    return int(convolution.kernel.size), _name(layer.get_input(0).dtype)


def _stored(trt: Any, tensor: Any, made_by: dict[str, Any]) -> tuple[int, str] | None:
    """Follow a weight to the constant it comes from: its size and the narrowest type on the way."""
    kind = _name(tensor.dtype)
    while tensor is not None and tensor.name in made_by:
        layer = made_by[tensor.name]
        if layer.type == trt.LayerType.CONSTANT:
            return prod(tensor.shape), kind
        tensor = layer.get_input(0) if layer.num_inputs else None
        if tensor is not None and _name(tensor.dtype) in _QUANTISED:
            kind = _name(tensor.dtype)
        elif layer.type == trt.LayerType.QUANTIZE:
            kind = _name(layer.get_output(0).dtype)
    return None


def _computes_in(trt: Any, tensor: Any, made_by: dict[str, Any]) -> str:
    """Return the type of an input; one that was just dequantised is computed on as it was stored."""
    layer = made_by.get(tensor.name)
    while layer is not None and layer.type == trt.LayerType.SHUFFLE:
        tensor = layer.get_input(0)
        layer = made_by.get(tensor.name)
    if layer is not None and layer.type == trt.LayerType.DEQUANTIZE:
        tensor = layer.get_input(0)
    return _name(tensor.dtype)


def _name(dtype: Any) -> str:
    return _TYPES.get(str(dtype.name), str(dtype.name).lower())


def _config(trt: Any, builder: Any, network: Any, options: BuildOptions) -> Any:
    config = builder.create_builder_config()
    (config.set_flag if options.tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the layers' types can be read back from the engine
    frames = network.get_input(0).name
    for smallest, usual, largest in options.profiles:
        profile = builder.create_optimization_profile()
        profile.set_shape(frames, (*smallest, 3), (*usual, 3), (*largest, 3))
        config.add_optimization_profile(profile)
    if options.targets:
        config.num_compute_capabilities = len(options.targets)
        for i, target in enumerate(options.targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), i)
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.timing_cache is not None:
        known = options.timing_cache.read_bytes() if options.timing_cache.exists() else b""
        if not config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False):
            raise InputError(
                f"The timing cache {options.timing_cache} is damaged, or another TensorRT or GPU made it. Delete it, or name another."
            )
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.dla_core is not None:
        if options.dla_core >= builder.num_DLA_cores:
            raise InputError(
                f"--dla {options.dla_core}: this machine has {builder.num_DLA_cores} DLA cores, counted from 0."
            )
        config.default_device_type = trt.DeviceType.DLA
        config.DLA_core = options.dla_core
        config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    return config


def _monitor(trt: Any, stack: ExitStack, description: str) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Shows the steps of the outermost phase."""

        def __init__(self) -> None:
            super().__init__()
            self.interrupted_by: int | None = None
            self.outermost: str | None = None
            self.advance: Advance | None = None

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None and self.outermost is None:
                self.outermost, self.advance = phase, stack.enter_context(progress(description, steps))

        def step_complete(self, phase: str, step: int) -> bool:
            if phase == self.outermost and self.advance is not None:
                self.advance()
            return self.interrupted_by is None

        def phase_finish(self, phase: str) -> None:
            pass

    return Monitor()


@contextmanager
def _interruptible(monitor: Any) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end a build at its next step; an exception in a monitor would count as TensorRT's failure."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return

    def interrupt(number: int, _: object) -> None:
        monitor.interrupted_by = number

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if monitor.interrupted_by is not None:
        signal.raise_signal(monitor.interrupted_by)
