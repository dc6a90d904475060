"""What a user would write instead, timed side by side with this toolkit, host to host: uint8 frame in, uint8 labels out.

    python benchmarks/against_the_usual.py student.pt student.onnx student.int8.onnx student.openvino.int8.onnx --data camvid:/data/CamVid

The usual pipeline: normalise in float and turn to NCHW with numpy, run the network with its upsampling, take the float logits
back, argmax with numpy. All contenders take turns in one run. The last column says whether they are forms of one network: the
share of the pixels that each labels as the float32 file does. Then some are held against each other frame by frame, since on a
machine that is not always equally fast turns differ by more than a backend adds to its runtime (`paired_ratio`).
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aicsd_deploy.bench.environment import environment
from aicsd_deploy.bench.latency import infer_ms, measure_latency, median_interval, prepare_frames
from aicsd_deploy.bench.machine_load import watch_machine
from aicsd_deploy.checkpoint import load_checkpoint
from aicsd_deploy.cli import Parser, add_json_flag, positive_int, run, write_result
from aicsd_deploy.console import progress, say, table
from aicsd_deploy.data.spec import SPEC_HELP, open_dataset
from aicsd_deploy.export.verify import frames_for_comparison
from aicsd_deploy.metadata import Metadata
from aicsd_deploy.runtime.base import Backend, UInt8Array, open_backend


class Contender(Backend):
    """One way to label a frame."""

    def __init__(self, name: str, metadata: Metadata, label: Callable[[UInt8Array], UInt8Array]) -> None:
        self.name, self.metadata, self.device = name, metadata, "cpu"
        self._label = label

    def infer(self, frames_NHWC: UInt8Array) -> UInt8Array:
        return self._label(frames_NHWC)


class Upsampled(nn.Module):
    """A network as most libraries hand it out: normalised images in, float logits at their size out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images_BCHW: Tensor) -> Tensor:
        size = images_BCHW.shape[2:]
        return F.interpolate(self.network(images_BCHW), size=size, mode="bilinear", align_corners=False)


def usual(metadata: Metadata, logits_of: Callable[[Any], Any]) -> Callable[[UInt8Array], UInt8Array]:
    """Return the usual pipeline around a network from float images to float logits."""
    mean, std = (np.asarray(values, np.float32) for values in (metadata.mean, metadata.std))

    def label(frames_NHWC: UInt8Array) -> UInt8Array:
        images = (frames_NHWC[..., ::-1].astype(np.float32) / 255 - mean) / std
        logits = logits_of(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        return np.asarray(np.argmax(logits, axis=1), np.uint8)

    return label


def bare_session(path: Path, threads: int | None) -> Callable[[Any], Any]:
    """Return nothing but an ONNX Runtime session's `run`; between its turns its threads leave the others alone."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.intra_op_num_threads = threads or 0  # 0 lets it choose
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda array: session.run(None, {name: array})[0]


def bare_openvino(path: Path, threads: int | None, **settings: str | int) -> Callable[[Any], Any]:
    """Return nothing but an OpenVINO request's `infer`; without settings a CPU with bfloat16 computes float layers in it."""
    import openvino

    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = openvino.Core().compile_model(str(path), "CPU", {"PERFORMANCE_HINT": "LATENCY"} | settings)
    request = compiled.create_infer_request()
    return lambda array: request.infer([array], share_inputs=True)[0]


OURS = ("this toolkit, float32", "this toolkit, INT8", "this toolkit, INT8 in OpenVINO")
BARE = ("bare ONNX Runtime session, float32", "bare ONNX Runtime session, INT8", "bare OpenVINO request, INT8")
USUAL = "usual pipeline, ONNX Runtime"
COMPARISONS = (
    *zip(OURS, BARE, strict=True),
    (OURS[0], OURS[1]),
    (OURS[0], OURS[2]),
    *((USUAL, name) for name in OURS),
)
"""Whose times are held against whose: the backend's to its bare runtime's, float32's to INT8's, the usual pipeline's to ours."""
PAIRS_PER_ROUND = 10


def paired_ratio(
    over: Backend, under: Backend, prepared: Sequence[UInt8Array], *, rounds: int
) -> tuple[float, float, float]:
    """Return the median ratio of two contenders' times for the same frame, one right after the other, and its interval.

    What slows the machine down for longer than a frame slows both of a pair down. Each goes first in every other pair,
    since the one that goes second finds the frame in the caches.
    """
    infer_ms(over, prepared[0]), infer_ms(under, prepared[0])
    ratios = np.empty((rounds, PAIRS_PER_ROUND))
    for pair in range(ratios.size):
        frame = prepared[pair // 2 % len(prepared)]
        order = (over, under) if pair % 2 else (under, over)
        times = {contender.name: infer_ms(contender, frame) for contender in order}
        ratios.flat[pair] = times[over.name] / times[under.name]
    return float(np.median(ratios)), *median_interval(ratios.tolist())


def contenders(
    checkpoint_path: Path, onnx: Path, int8: Path, openvino: Path, folder: Path, threads: int | None
) -> list[Backend]:
    """Build all of them, ours first."""
    if threads is not None:
        torch.set_num_threads(threads)
    ours = [open_backend(path, device="cpu", threads=threads) for path in (onnx, int8, openvino)]
    metadata = ours[0].metadata
    network = Upsampled(load_checkpoint(checkpoint_path).build()).eval()
    example = torch.zeros(1, 3, *metadata.image_size_hw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network, (example,), folder / "usual.onnx", dynamo=True, external_data=False, verbose=False)
    compiled = torch.compile(network)

    def in_torch(module: Any) -> Callable[[Any], Any]:
        def logits_of(images: Any) -> Any:
            with torch.inference_mode():
                return module(torch.from_numpy(images)).numpy()

        return logits_of

    for backend, name in zip(ours, OURS, strict=True):
        backend.name = name
    return [
        *ours,
        Contender(BARE[0], metadata, bare_session(onnx, threads)),
        Contender(BARE[1], metadata, bare_session(int8, threads)),
        Contender(BARE[2], metadata, bare_openvino(openvino, threads, INFERENCE_PRECISION_HINT="f32")),
        Contender(USUAL, metadata, usual(metadata, bare_session(folder / "usual.onnx", threads))),
        Contender("usual pipeline, torch eager", metadata, usual(metadata, in_torch(network))),
        Contender("usual pipeline, torch compiled", metadata, usual(metadata, in_torch(compiled))),
        Contender("OpenVINO, float32", metadata, bare_openvino(onnx, threads, INFERENCE_PRECISION_HINT="f32")),
        Contender("OpenVINO, as it comes", metadata, bare_openvino(onnx, threads)),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="the checkpoint")
    parser.add_argument("onnx", type=Path, help="its float32 file, exported with channels bgr")
    parser.add_argument("int8", type=Path, help="its INT8 file")
    parser.add_argument("openvino", type=Path, help="its INT8 file made with --target openvino")
    parser.add_argument("--data", metavar="SPEC", help=f"{SPEC_HELP} (default: what it was trained on)")
    parser.add_argument(
        "--rounds", type=positive_int, metavar="N", default=20, help="rounds of 5 frames, or of 10 pairs"
    )
    parser.add_argument(
        "--threads", type=positive_int, metavar="N", help="CPU threads of every runtime (default: as each chooses)"
    )
    add_json_flag(parser)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = contenders(args.checkpoint, args.onnx, args.int8, args.openvino, Path(folder), args.threads)
        frames = frames_for_comparison(open_dataset(args.data or found[0].metadata.data, "val"), count=8)
        prepared = prepare_frames(found[0], frames)
        expected = [found[0].infer(frame) for frame in prepared]
        agreement = [float(np.mean([c.infer(f) == e for f, e in zip(prepared, expected, strict=True)])) for c in found]
        with watch_machine() as load:
            latencies = measure_latency(found, frames, rounds=args.rounds)
            named = {contender.name: contender for contender in found}
            ratios = {}
            with progress("frame by frame", len(COMPARISONS)) as advance:
                for over, under in COMPARISONS:
                    ratios[f"{over} / {under}"] = paired_ratio(named[over], named[under], prepared, rounds=args.rounds)
                    advance()
    first = latencies[0].p50_ms
    rows = [
        [c.name, f"{x.p50_ms:.2f}", f"{x.p50_interval_ms[0]:.2f}–{x.p50_interval_ms[1]:.2f}", f"{x.p50_ms / first:.3f}", f"{100 * a:.2f}"]
        for c, x, a in zip(found, latencies, agreement, strict=True)
    ]  # fmt: skip
    say(table(["", "p50, ms", "95 % interval", "of this toolkit's float32", "labels as it, %"], rows))
    say(table(["frame by frame", "ratio", "95 % interval"], [[n, f"{r:.3f}", f"{lo:.3f}–{hi:.3f}"] for n, (r, lo, hi) in ratios.items()]))  # fmt: skip
    for line in load.noise():
        say(f"noisy: {line}")
    result = {
        "contenders": [{"name": c.name, "agreement": a, **asdict(x)} for c, x, a in zip(found, latencies, agreement, strict=True)],
        "ratios": ratios,
        "machine_load": asdict(load),
        "environment": environment(),
    }  # fmt: skip
    write_result(result, args.json)


if __name__ == "__main__":
    run(main)
