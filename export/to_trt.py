"""Turn an exported ONNX file into a TensorRT engine.

    python export/to_trt.py student.onnx --fp16 -o student.plan

This version checks its input and says what this machine lacks to build an engine; the build itself comes next.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from aicsd_deploy.cli import Parser, add_json_flag, run
from aicsd_deploy.console import say
from aicsd_deploy.errors import InputError, MissingDependencyError
from aicsd_deploy.export.tensorrt_build import require_driver, require_tensorrt
from aicsd_deploy.runs import newest_artifact
from aicsd_deploy.runtime.base import open_backend

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "onnx", type=Path, nargs="?", help="file made by export/to_onnx.py (default: the newest under runs/)"
    )
    parser.add_argument(
        "-o", "--out", type=Path, metavar="FILE", help="engine to write (default: student.plan beside the ONNX file)"
    )
    precision = parser.add_mutually_exclusive_group()
    for name in PRECISIONS:
        help_text = f"weights and activations in {name}" + (" (the default)" if name == "fp16" else "")
        precision.add_argument(f"--{name}", dest="precision", action="store_const", const=name, help=help_text)
    parser.set_defaults(precision="fp16")
    parser.add_argument(
        "--flavor",
        choices=["auto", "tensorrt", "rtx"],
        default="auto",
        help="TensorRT, or TensorRT-RTX for desktop cards",
    )
    parser.add_argument(
        "--target", metavar="SM,…", help="cards to build for, for example sm86,sm89 (TensorRT-RTX only)"
    )
    add_json_flag(parser)
    args = parser.parse_args(argv)
    onnx = args.onnx or newest_artifact()
    out = args.out or onnx.with_suffix(".plan")
    if onnx.suffix != ".onnx":
        raise InputError(f"{onnx} is not an ONNX file. Export the checkpoint first: python export/to_onnx.py {onnx}")
    if out.suffix != ".plan":
        raise InputError(f"{out} must end in .plan.")
    if args.target and args.flavor != "rtx":
        raise InputError("--target is for --flavor rtx; TensorRT builds for the GPU of the machine it runs on.")
    with open_backend(onnx, device="cpu") as backend:
        say(f"{onnx}: {backend.metadata.model}, {len(backend.metadata.classes)} classes, asked for {args.precision}")
    if args.flavor == "rtx":
        raise MissingDependencyError("This version cannot build TensorRT-RTX engines yet.")
    require_driver()
    require_tensorrt()
    raise MissingDependencyError("TensorRT is there, but this version cannot build engines yet.")


if __name__ == "__main__":
    run(main)
