"""Turn an exported ONNX file into INT8 (explicit Q/DQ), calibrated on training images and proved on validation images.

    python export/to_int8.py student.onnx -o student.int8.onnx
    python export/to_int8.py student.onnx --target openvino -o student.openvino.int8.onnx
    python export/to_int8.py student.onnx --target tensorrt -o student.trt.int8.onnx

Each runtime wants a file of its own: cpu is quick in ONNX Runtime, openvino runs in OpenVINO (try both on a CPU with VNNI or
AMX), tensorrt is what its parser takes; both is that form too, proved as a CPU runs it, where it is slower than float32. A file
that loses more mIoU than allowed is not written (exit code 3).
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # a checkout that is not installed: cli says what is missing

from aicsd_deploy.cli import (
    Parser,
    add_json_flag,
    fraction_of_100,
    keep_apart,
    needed_packages,
    positive_int,
    run,
    write_result,
)
from aicsd_deploy.console import percent, say, table
from aicsd_deploy.errors import InputError
from aicsd_deploy.files import atomic_path
from aicsd_deploy.runs import newest_artifact

with needed_packages():
    from aicsd_deploy.bench.latency import measure_latency
    from aicsd_deploy.data.spec import SPEC_HELP, open_dataset
    from aicsd_deploy.export.int8_search import quantize_within
    from aicsd_deploy.export.quantize import METHODS, TARGETS
    from aicsd_deploy.export.verify import frames_for_comparison
    from aicsd_deploy.runtime.base import open_backend
    from aicsd_deploy.runtime.ort_backend import DISABLED_OPTIMIZERS


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("onnx", type=Path, nargs="?", help="float32 file of export/to_onnx.py (default: the newest under runs/)")
    add(
        "-o",
        "--out",
        type=Path,
        metavar="FILE",
        help="file to write (default: student.int8.onnx, or student.TARGET.int8.onnx for another target than cpu)",
    )
    add("--target", choices=TARGETS, default="cpu", help="what will run it")
    add("--data", metavar="SPEC", help=f"images with labels: {SPEC_HELP} (default: what it was trained on)")
    add("--frames", type=positive_int, metavar="N", default=32, help="training images to calibrate on")
    add("--method", choices=["best", *METHODS], default="best", help="how ranges are chosen; best tries every way")
    add(
        "--max-miou-drop",
        type=fraction_of_100,
        metavar="POINTS",
        default="1",
        help="points of mIoU that may be lost; layers are left in float until it holds",
    )
    add("--keep-float", choices=["first", "last"], nargs="+", default=[], help="layers left in float anyway")
    add_json_flag(parser)
    args = parser.parse_args(argv)
    source = args.onnx or newest_artifact(float_only=True)
    out = args.out or source.with_suffix(".int8.onnx" if args.target == "cpu" else f".{args.target}.int8.onnx")
    if source.suffix != ".onnx":
        raise InputError(f"{source} is not an ONNX file. Export the checkpoint: python export/to_onnx.py {source}")
    if out.suffix != ".onnx" or out.resolve() == source.resolve():
        raise InputError(f"{out} must end in .onnx, and not be the float32 file itself. Give another name with -o.")
    keep_apart(args.json, source, out)
    with open_backend(source, device="cpu") as backend:
        spec = args.data or backend.metadata.data
    val = open_dataset(spec, "val")
    with atomic_path(out) as temporary:
        result = quantize_within(
            source,
            temporary,
            target=args.target,
            train=open_dataset(spec, "train"),
            val=val,
            frames=args.frames,
            methods=list(METHODS) if args.method == "best" else [args.method],
            keep_float=args.keep_float,
            max_miou_drop=args.max_miou_drop,
        )
        with open_backend(source, device="cpu") as before, open_backend(temporary, device="cpu") as after:
            times = measure_latency([before, after], frames_for_comparison(val, count=8), rounds=10)
    if result.layer_costs:
        ranked = sorted(result.layer_costs.items(), key=lambda item: -item[1])
        rows = [[n, f"{100 * c:.3f}", "float" if n in result.float_layers else "int8"] for n, c in ranked]
        say(table(["layer", "labels changed by it alone, %", "now"], rows))
    rows = [
        [name, percent(scores.miou), f"{latency.p50_ms:.2f}", f"{path.stat().st_size / 1e6:.1f}"]
        for name, scores, latency, path in (
            ("float32", result.float_scores, times[0], source),
            (f"int8, {args.target}, {result.method}", result.int8_scores, times[1], out),
        )
    ]
    say(table(["", f"mIoU on {spec} (val), %", "p50 here, ms", "file, MB"], rows))
    if result.float_layers and args.target != "openvino":
        say(f"In programs of your own, open it with disabled_optimizers={DISABLED_OPTIMIZERS}: it has float layers.")
    if args.target in ("cpu", "openvino") and times[1].p50_ms >= times[0].p50_ms:
        say("INT8 is not faster than float32 on this CPU; use it only for its size.")
    following = ["export/to_trt.py", "--int8"] if args.target == "tensorrt" else ["demo/benchmark.py", str(source)]
    say(f"{out}\nnext: {shlex.join(['python', *following, str(out)])}")
    latency_ms = {"float32": times[0].p50_ms, "int8": times[1].p50_ms}
    write_result({"path": str(out), "p50_ms": latency_ms, "miou_drop": result.drop, **asdict(result)}, args.json)


if __name__ == "__main__":
    run(main)
