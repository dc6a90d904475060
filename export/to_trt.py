"""Turn an exported ONNX file into a TensorRT engine, and prove that it is what it says.

    python export/to_trt.py student.onnx --fp16 -o student.plan
    python export/to_trt.py student.onnx --fp16 --flavor rtx --target sm86,sm89,sm120 -o student.plan
    python export/to_trt.py student.onnx --fp16 --profile 1x180x240 1x360x480 8x720x960

Beside the engine stands student.plan.json: classes, input, the cards it fits, the precision read back after building, and how
well it agrees with the checkpoint. An engine that is not in the precision asked for, or that loses more than the limits
allow, is not written (exit code 3). TensorRT builds on the GPU that the engine will run on; TensorRT-RTX builds engines for
desktop RTX cards on any machine.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # a checkout that is not installed: cli says what is missing

from aicsd_deploy.cli import (
    Parser,
    add_json_flag,
    fraction,
    fraction_of_100,
    gpu_targets,
    keep_apart,
    needed_packages,
    positive_int,
    run,
    shape_nhw,
    write_result,
)
from aicsd_deploy.console import percent, say
from aicsd_deploy.errors import InputError
from aicsd_deploy.files import existing_file
from aicsd_deploy.runs import newest_artifact

with needed_packages():
    from aicsd_deploy.data.spec import SPEC_HELP
    from aicsd_deploy.export.engine import Request, choose_flavor, make_engine
    from aicsd_deploy.export.gate import LIMITS
    from aicsd_deploy.export.tensorrt_build import BuildOptions, refuse_unfit_options
    from aicsd_deploy.runtime.engine_card import card_path
    from aicsd_deploy.runtime.tensorrt_module import NAMES

PRECISIONS = {
    "fp32": "weights and activations in float32",
    "fp16": "in float16, but for what float16 cannot hold (the default)",
    "bf16": "in bfloat16: the range of float32 with 8 bits of precision",
    "int8": "as the Q/DQ nodes of the file say, the rest in fp16; made by export/to_int8.py --target tensorrt",
    "fp8": "as the float8 Q/DQ nodes of the file say; needs sm89 or newer",
}


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("onnx", type=Path, nargs="?", help="file made by export/to_onnx.py (default: the newest under runs/)")
    add("-o", "--out", type=Path, metavar="FILE", help="engine to write (default: student.plan beside the ONNX file)")
    precision = parser.add_mutually_exclusive_group()
    for name, text in PRECISIONS.items():
        precision.add_argument(f"--{name}", dest="precision", action="store_const", const=name, help=text)
    parser.set_defaults(precision="fp16")
    # fmt: off
    add("--tf32", action="store_true", help="let float32 layers compute in TF32 (10 bits of mantissa), on cards from Ampere on")
    add("--flavor", choices=["auto", "tensorrt", "rtx"], default="auto", help="TensorRT, or TensorRT-RTX for desktop cards; auto takes TensorRT where it can build, else TensorRT-RTX")
    add("--target", dest="targets", type=gpu_targets, default=(), metavar="SM,…", help="cards to build for, for example sm86,sm89,sm120 (RTX 30, 40, 50); TensorRT-RTX only; without it, every card from Ampere on")
    add("--profile", dest="profiles", type=shape_nhw, nargs=3, action="append", default=[], metavar=("MIN", "USUAL", "MAX"), help="shapes NxHxW that a dynamic engine is built for; may be given more than once, the first that fits is used (default: batches 1 to 8, sizes from half to one and a half)")
    add("--workspace", dest="workspace_mib", type=positive_int, metavar="MIB", help="scratch memory the engine may use (default: all that the card has)")
    add("--optimization-level", type=int, choices=range(6), metavar="0…5", help="how long TensorRT searches for fast kernels (default: its own, 3)")
    add("--timing-cache", type=Path, metavar="FILE", help="measured kernel timings, read and updated: later builds are faster and alike; TensorRT only")
    add("--hardware-compatible", action="store_true", help="also run on other cards from Ampere on, at some cost in speed; TensorRT only")
    add("--version-compatible", action="store_true", help="also run in newer versions of the same major TensorRT; such an engine carries code for the CPU, so loading it needs AICSD_TRUST=tensorrt-host-code; TensorRT only")
    add("--dla", dest="dla_core", type=int, metavar="CORE", help="run on a Jetson's deep-learning accelerator, the GPU taking what it cannot; TensorRT only")
    add("--data", metavar="SPEC", help=f"frames to measure ranges on (train) and to compare on (val): {SPEC_HELP} (default: what it was trained on)")
    add("--frames", type=positive_int, metavar="N", default=16, help="how many images the comparison takes")
    add("--reference", type=Path, metavar="FILE", help="checkpoint, or float .onnx, to compare with (default: the checkpoint it was exported from, if it lies beside the file; else the file itself)")
    add("--min-agreement", type=fraction, metavar="SHARE", help="smallest share of pixels labelled as the reference does (default: 0.999 fp32, 0.995 fp16, 0.98 bf16, 0.95 int8 and fp8)")
    add("--max-miou-drop", type=fraction_of_100, metavar="POINTS", help="largest fall of mIoU, in points of a hundred (default: 0.1 fp32, 0.5 fp16; 1 bf16, int8 and fp8)")
    # fmt: on
    add_json_flag(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    args.profiles = tuple(tuple(profile) for profile in args.profiles)
    onnx = args.onnx or newest_artifact(float_only=args.precision not in ("int8", "fp8"))
    out = args.out or onnx.with_suffix(".plan")
    if onnx.suffix != ".onnx":
        raise InputError(f"{onnx} is not an ONNX file. Export the checkpoint first: python export/to_onnx.py {onnx}")
    existing_file(onnx, "The ONNX file")
    if out.suffix != ".plan":
        raise InputError(f"-o {out} must end in .plan, by which every command knows an engine.")
    keep_apart(args.json, onnx, out, card_path(out))
    flavor, reason = choose_flavor(args.flavor)
    options = BuildOptions(**{field.name: getattr(args, field.name) for field in dataclasses.fields(BuildOptions)})
    refuse_unfit_options(flavor, options)
    limits = LIMITS[args.precision].replaced(args.min_agreement, args.max_miou_drop)
    request = Request(args.precision, flavor, options, args.data, args.frames, args.reference, limits)
    tf32 = " with TF32" if args.tf32 else ", TF32 off"
    say(f"{onnx} → {out}: {args.precision}{tf32 if args.precision == 'fp32' else ''}, {NAMES[flavor]} {reason}")
    card = make_engine(onnx, out, request)
    shares = card.gate["agreement_by_size"].items()
    lines = [f"{size}: {percent(share)} % of the pixels as the reference" for size, share in shares]
    miou, before = percent(card.gate["miou"]), percent(card.gate["reference_miou"])
    lines.append(f"mIoU {miou} %, of the reference {before} %, on {card.gate['frames']} images of {card.gate['data']}")
    say("\n".join(lines))
    say(f"{out} ({out.stat().st_size / 1e6:.1f} MB) for {card.runs_on}; what it is: {card_path(out)}")
    where = "" if card.gate["compared"].startswith("the engine") else ", on a machine with such a card"
    say(f"next{where}: python demo/video.py --engine {out}")
    write_result({"path": str(out), "card": str(card_path(out)), **dataclasses.asdict(card)}, args.json)


if __name__ == "__main__":
    run(main)
