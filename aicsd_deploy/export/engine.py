"""From an exported ONNX file to a TensorRT engine that is proved: precision baked in, built, read back, compared, described."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import onnx

from aicsd_deploy.console import say
from aicsd_deploy.data.dataset import SegmentationDataset
from aicsd_deploy.data.spec import open_dataset
from aicsd_deploy.errors import AicsdError, InputError, MissingDependencyError
from aicsd_deploy.evaluate import check_same_classes
from aicsd_deploy.export.engine_checks import (
    Precision,
    require_fitting_graph,
    require_fitting_profiles,
    require_fitting_reference,
    require_own_contract,
    require_precision,
    usual_profile,
)
from aicsd_deploy.export.gate import LIMITS, Drop, Limits, measure_drop, require_within
from aicsd_deploy.export.precision import Half, to_half, with_constants_as_initializers
from aicsd_deploy.export.ranges import layer_errors, nodes_to_keep
from aicsd_deploy.export.tensorrt_build import BuildOptions, PrecisionFound, Profile, build_engine
from aicsd_deploy.export.verify import frames_for_comparison
from aicsd_deploy.files import atomic_path, check_writable, sha256
from aicsd_deploy.metadata import Metadata, provenance
from aicsd_deploy.runs import RUNS
from aicsd_deploy.runtime.base import Backend, UInt8Array, open_backend
from aicsd_deploy.runtime.driver import Gpu
from aicsd_deploy.runtime.engine_card import EngineCard, card_path
from aicsd_deploy.runtime.frames import as_input
from aicsd_deploy.runtime.ort_backend import DISABLED_OPTIMIZERS, OrtBackend
from aicsd_deploy.runtime.tensorrt_module import Flavor, load_tensorrt, require_tensorrt_gpu
from aicsd_deploy.runtime.trt_backend import TensorRTBackend

CALIBRATION_FRAMES = 8
HALVES: dict[Precision, Half] = {"fp16": "fp16", "bf16": "bf16", "int8": "fp16"}
"""What a float graph, or the rest of a quantised one, is computed in."""


@dataclass(frozen=True)
class Request:
    """What is wanted.

    Attributes:
        precision: of weights and activations.
        flavor: the TensorRT to build with.
        options: how to build; without profiles, usual ones are made for a dynamic graph.
        data: where frames and labels come from; None takes what the network was trained on.
        frames: how many images the proof takes.
        reference: the checkpoint to compare with; None looks for it beside the file, and takes the file itself without one.
        limits: what may be lost; None takes the precision's own.
    """

    precision: Precision
    flavor: Flavor
    options: BuildOptions = field(default_factory=BuildOptions)
    data: str | None = None
    frames: int = 16
    reference: Path | None = None
    limits: Limits | None = None


def choose_flavor(name: Literal["auto", "tensorrt", "rtx"]) -> tuple[Flavor, str]:
    """Return the TensorRT to build with, and why.

    Raises:
        MissingDependencyError: what was asked for is not there, or with "auto" neither of the two.
    """
    if name == "rtx":
        load_tensorrt("rtx")
        return "rtx", "as asked for"
    try:
        require_tensorrt_gpu("tensorrt", why="TensorRT builds an engine on the GPU that it will run on.")
        load_tensorrt("tensorrt")
    except MissingDependencyError as error:
        if name == "tensorrt":
            raise
        try:
            load_tensorrt("rtx")
        except MissingDependencyError as other:
            raise MissingDependencyError(
                f"No engine can be built here. {error} TensorRT-RTX, which needs no GPU to build for desktop RTX cards, would serve "
                f"too: {other}"
            ) from error
        return "rtx", f"for desktop RTX cards, which needs no GPU to build. TensorRT cannot build here: {error}"
    return "tensorrt", "as asked for" if name == "tensorrt" else "since it is installed and there is a GPU"


def make_engine(onnx_path: Path, out: Path, request: Request) -> EngineCard:
    """Build an engine and its card, prove them, and write both; see `Request`.

    Raises:
        InputError: the file, an option or the data does not fit.
        MissingDependencyError: what the build needs is not on this machine.
        VerificationError: the engine is not in the precision asked for, or loses more than the limits allow.
    """
    # To build can take long, so all that could be wrong is looked at first.
    check_writable(out)
    check_writable(card_path(out))
    with OrtBackend(onnx_path, device="cpu") as source:
        metadata = source.metadata
    model = with_constants_as_initializers(onnx.load(str(onnx_path)))
    require_own_contract(model, metadata, onnx_path)
    require_fitting_graph(model, request.precision, onnx_path)
    reference_path = request.reference or find_checkpoint(onnx_path, metadata) or onnx_path
    if reference_path == onnx_path and request.precision in ("int8", "fp8"):
        raise InputError(
            f"{onnx_path} is quantised, and the checkpoint it comes from does not lie beside it; compared with itself it would "
            "prove nothing. Give --reference best.pt, or the .onnx file that was quantised."
        )
    validation = open_dataset(request.data or metadata.data, "val")
    check_same_classes(metadata.classes, validation.classes, spec=validation.spec)
    reference = _open_reference(reference_path, metadata)
    options = request.options
    if not options.profiles and metadata.dynamic:
        options = dataclasses.replace(options, profiles=(usual_profile(metadata),))
    require_fitting_profiles(options.profiles, metadata)
    graph, runnable, float32_nodes = _lowered(model, metadata, request)
    engine = build_engine(graph, request.flavor, options)
    _say_precision(engine.precision)
    gpu = _gpu_for(request.flavor, options.targets)
    card = EngineCard(
        plan_sha256=hashlib.sha256(engine.plan).hexdigest(),
        onnx_sha256=sha256(onnx_path),
        metadata=metadata.replace(precision=request.precision),
        flavor=request.flavor,
        version=engine.version,
        targets=options.targets,
        gpu=gpu if request.flavor == "tensorrt" else None,
        profiles=options.profiles,
        precision_found=asdict(engine.precision) | {"tf32": options.tf32},
        float32_nodes=float32_nodes,
        options={k: v for k, v in asdict(options).items() if k not in ("profiles", "targets", "timing_cache") and v},
        gate={},
        provenance=provenance(),
    )
    limits = request.limits or LIMITS[request.precision]
    with atomic_path(out) as plan:
        require_precision(engine.precision, request.precision, str(out))
        plan.write_bytes(engine.plan)
        with reference, _candidate(plan, card, runnable, gpu) as (candidate, what):
            say(f"comparing {what} with {reference_path}")
            sizes = _sizes(options.profiles, metadata)
            drop = measure_drop(reference, candidate, validation, frames=request.frames, sizes=sizes)
        layers: list[str] = []
        if graph is not model and not drop.within(limits):
            errors = layer_errors(model, runnable, _calibration_frames(validation, metadata)[:2])
            layers = [f"{name} ({error:.2g})" for name, error in list(errors.items())[:3]]
        require_within(drop, limits, what=str(out), layers=layers)
        card = dataclasses.replace(card, gate=_gate(drop, limits, what, reference_path, validation.spec))
        card.write(card_path(out))
    return card


def _lowered(
    model: onnx.ModelProto, metadata: Metadata, request: Request
) -> tuple[onnx.ModelProto, onnx.ModelProto, dict[str, str]]:
    """Return the graph to build, the same as ONNX Runtime can run it, and the nodes that stay in float32, with the reasons."""
    half = HALVES.get(request.precision)
    if half is None:
        return model, model, {}
    calibration = _calibration_frames(open_dataset(request.data or metadata.data, "train"), metadata)
    kept = nodes_to_keep(model, half, calibration)
    lowered = to_half(model, half, keep=kept)
    if kept:
        listed = "\n".join(f"  {name}: {reason}" for name, reason in kept.items())
        say(f"{len(kept)} of {len(kept) + len(lowered.low)} nodes stay in float32:\n{listed}")
    # ONNX Runtime has no bfloat16 kernels for the CPU.
    runnable = to_half(model, half, keep=kept, emulate=True).model if half == "bf16" else lowered.model
    return lowered.model, runnable, kept


def find_checkpoint(onnx_path: Path, metadata: Metadata) -> Path | None:
    """Return the checkpoint that a file was exported from, if it lies beside it, in a folder below or under runs/; known by its hash."""
    wanted = metadata.provenance.get("checkpoint_sha256")
    if wanted is None:
        return None
    folder = onnx_path.parent
    candidates = [*folder.glob("*.pt"), *folder.glob("*/best.pt"), *RUNS.rglob("best.pt")]
    return next((path for path in candidates if sha256(path) == wanted), None)


def _gpu_for(flavor: Flavor, targets: Sequence[str]) -> Gpu | None:
    """Return the GPU of this machine if an engine for these targets can run on it."""
    try:
        gpu = require_tensorrt_gpu(flavor, why="")
    except MissingDependencyError:
        return None
    return gpu if not targets or gpu.target in targets else None


def _open_reference(path: Path, metadata: Metadata) -> Backend:
    """Open what is right, on the CPU, since it must not depend on the GPU that happens to be here."""
    if path.suffix == ".onnx":
        reference = open_backend(path, device="cpu")
    else:
        import torch

        from aicsd_deploy.checkpoint import load_checkpoint
        from aicsd_deploy.runtime.torch_backend import TorchBackend

        loaded = load_checkpoint(path)
        same_input = loaded.metadata.replace(channel_order=metadata.channel_order, image_size_hw=metadata.image_size_hw)
        reference = TorchBackend(loaded.build(), same_input, device=torch.device("cpu"))
    require_fitting_reference(reference.metadata, metadata, path)
    return reference


@contextmanager
def _candidate(
    plan: Path, card: EngineCard, runnable: onnx.ModelProto, gpu: Gpu | None
) -> Iterator[tuple[Backend, str]]:
    """Open the engine where it can run; else its very graph in ONNX Runtime, whatever the file it came from was made for."""
    precision = card.metadata.precision
    if gpu is not None and (engine := _opened(plan, card)) is not None:
        with engine:
            yield engine, f"the engine on {gpu.name}"
        return
    temporary = plan.with_suffix(".onnx")
    try:
        onnx.save_model(runnable, str(temporary))
        # It kills the process on some float16 graphs of attention with a dynamic size (onnxruntime 1.32).
        disabled = [*DISABLED_OPTIMIZERS, "MatmulTransposeFusion"]
        with OrtBackend(temporary, device="cpu", disabled=disabled) as backend:
            where = "its graph, rounded to bfloat16 at every step," if precision == "bf16" else f"its {precision} graph"
            yield backend, f"{where} in ONNX Runtime on the CPU (the engine itself cannot run here)"
    finally:
        temporary.unlink(missing_ok=True)


def _opened(plan: Path, card: EngineCard) -> Backend | None:
    """Return the engine, loaded; None where it cannot run on this machine's GPU although there is one, and say why."""
    description = card_path(plan)
    try:
        card.write(description)
        return TensorRTBackend(plan, built_here=True)
    except AicsdError as error:
        if card.flavor == "tensorrt" and not isinstance(error, MissingDependencyError):
            raise
        # Nobody to own GPU memory, or a card that is not among those which TensorRT-RTX builds for unless told to.
        say(f"note: the engine cannot run here: {error}")
        return None
    finally:
        description.unlink(missing_ok=True)


def _calibration_frames(dataset: SegmentationDataset, metadata: Metadata) -> list[UInt8Array]:
    return [as_input(frame, metadata) for frame in frames_for_comparison(dataset, count=CALIBRATION_FRAMES)]


def _sizes(profiles: Sequence[Profile], metadata: Metadata) -> list[tuple[int, int]] | None:
    if "size" not in metadata.dynamic:
        return None
    return list(dict.fromkeys((height, width) for profile in profiles for _, height, width in profile))


def _gate(drop: Drop, limits: Limits, what: str, reference: Path, data: str) -> dict[str, object]:
    return {
        "compared": what,
        "reference": str(reference),
        "data": data,
        "frames": drop.agreement.frames,
        "agreement": drop.agreement.share,
        "agreement_by_size": drop.agreement.by_size,
        "miou": drop.candidate_miou,
        "reference_miou": drop.reference_miou,
        "iou_drop": drop.iou_drop,
        "limits": asdict(limits),
    }


def _say_precision(found: PrecisionFound) -> None:
    total = max(1, sum(found.weights.values()))
    weights = ", ".join(f"{100 * n / total:.1f} % {kind}" for kind, n in found.weights.items())
    layers = ", ".join(f"{n} {kind}" for kind, n in found.weighted_layers.items())
    say(f"read back from the built network: weights {weights}; weighted layers {layers}")
