"""Turn a checkpoint into an ONNX file, and prove on real frames that it does what the checkpoint does.

    python export/to_onnx.py runs/student/best.pt -o student.onnx
    python export/to_onnx.py runs/student/best.pt -o student.onnx --dynamic batch size --image-size 360x480

The file takes uint8 frames (N, H, W, 3) and gives uint8 labels (N, H, W): normalisation, network, upsampling and argmax
are inside, and so are the classes and colours. If it disagrees with the checkpoint, it is not written (exit code 3).
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
    keep_apart,
    needed_packages,
    positive_int,
    run,
    size_hw,
    write_result,
)
from aicsd_deploy.console import percent, say
from aicsd_deploy.errors import InputError
from aicsd_deploy.files import atomic_path, sha256
from aicsd_deploy.runs import newest_checkpoint

with needed_packages():
    from aicsd_deploy.data.spec import SPEC_HELP, open_dataset
    from aicsd_deploy.export.verify import compare, frames_for_comparison, require_agreement
    from aicsd_deploy.metadata import provenance
    from aicsd_deploy.runtime.base import open_backend


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, nargs="?", help="best.pt of a run (default: the newest student's under runs/)")
    # fmt: off
    add("-o", "--out", type=Path, metavar="FILE", help="file to write (default: student.onnx or teacher.onnx beside the checkpoint)")
    add("--dynamic", choices=["batch", "size"], nargs="+", default=[], help="what may differ from call to call; batch, size or both")
    add("--image-size", type=size_hw, metavar="HxW", help="size of the frames it takes (default: as trained)")
    add("--channels", choices=["bgr", "rgb"], default="bgr", help="channel order of the frames; bgr as cameras give it")
    add("--opset", type=positive_int, metavar="N", help="ONNX operator set (default: 18, which TensorRT 10 and 11 and ONNX Runtime since 1.15 read; another only for a program that asks for it)")
    add("--data", metavar="SPEC", help=f"where the frames for the proof come from: {SPEC_HELP} (default: what it was trained on)")
    # fmt: on
    add("--frames", type=positive_int, metavar="N", default=16, help="how many frames the proof takes")
    add_json_flag(parser)
    args = parser.parse_args(argv)
    path = args.checkpoint or newest_checkpoint(role="student")
    if path is None:
        raise InputError(
            "No checkpoint was given and there is no finished student under runs/. Make one: python train/distill.py"
        )
    if args.out is not None and args.out.suffix != ".onnx":
        raise InputError(f"-o {args.out} must end in .onnx, by which every command knows such a file.")
    # Only now, since importing torch and torchvision takes seconds: wrong flags are told at once.
    import torch

    from aicsd_deploy.checkpoint import load_checkpoint
    from aicsd_deploy.export.onnx_export import OPSET, export_onnx
    from aicsd_deploy.models import command_for
    from aicsd_deploy.runtime.torch_backend import TorchBackend

    checkpoint = load_checkpoint(path)
    out = args.out or path.with_name(f"{checkpoint.metadata.role}.onnx")
    keep_apart(args.json, path, out)
    metadata = checkpoint.metadata.replace(
        image_size_hw=args.image_size or checkpoint.metadata.image_size_hw,
        channel_order=args.channels,
        dynamic=tuple(sorted(set(args.dynamic))),
        provenance=checkpoint.metadata.provenance | {"checkpoint_sha256": sha256(path)} | provenance(),
    )
    frames = frames_for_comparison(open_dataset(args.data or metadata.data, "val"), count=args.frames)
    say(f"exporting {path} ({metadata.model}, {metadata.image_size_hw[0]}x{metadata.image_size_hw[1]})")
    with atomic_path(out) as temporary:
        export_onnx(checkpoint, metadata, temporary, opset=args.opset or OPSET)
        # The proof runs on the CPU: the reference must not depend on the GPU that happens to be here.
        reference = TorchBackend(
            checkpoint.build(), checkpoint.metadata.replace(channel_order=args.channels), device=torch.device("cpu")
        )
        with open_backend(temporary, device="cpu") as candidate:
            agreement = compare(reference, candidate, frames)
            runtime = candidate.name
        require_agreement(agreement, what=str(out))
    say(
        "\n".join(
            f"{size}: {percent(share)} % of the pixels as the checkpoint" for size, share in agreement.by_size.items()
        )
    )
    say(
        f"{out} ({out.stat().st_size / 1e6:.1f} MB), proved in {runtime} on {agreement.frames} frames of {args.data or metadata.data}"
    )
    following = shlex.join(["python", "demo/benchmark.py", str(path), str(out)])
    say(f"next: {command_for(metadata.model, following)}")
    write_result({"path": str(out), "agreement": asdict(agreement)}, args.json)


if __name__ == "__main__":
    run(main)
