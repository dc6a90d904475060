"""Turn a checkpoint into an ONNX file, and prove on real frames that it does what the checkpoint does.

    python export/to_onnx.py runs/student/best.pt -o student.onnx
    python export/to_onnx.py runs/student/best.pt -o student.onnx --dynamic batch size --image-size 360x480
    python export/to_onnx.py hf:FOLDER --data cityscapes:/data/Cityscapes --image-size 512x1024 -o teacher.onnx

The file takes uint8 frames (N, H, W, 3) and gives uint8 labels (N, H, W): normalisation, network, upsampling and argmax
are inside, and so are the classes and colours. If it disagrees with the checkpoint, it is not written (exit code 3).
A network that was trained elsewhere is named as --teacher of train/distill.py takes it; the file can then be scored,
measured, made INT8 or an engine, and shown on video as any other.
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
    # fmt: off
    add("network", nargs="?", help="best.pt of a run (default: the newest student's under runs/), or a trained network from elsewhere: hf:NAME, torchvision:NAME:WEIGHTS.pth, package.module:function, …")
    add("-o", "--out", type=Path, metavar="FILE", help="file to write (default: student.onnx or teacher.onnx beside the checkpoint; teacher.onnx for a network from elsewhere)")
    add("--dynamic", choices=["batch", "size"], nargs="+", default=[], help="what may differ from call to call; batch, size or both")
    add("--image-size", type=size_hw, metavar="HxW", help="size of the frames it takes (default: as trained; for a network from elsewhere that of the data)")
    add("--channels", choices=["bgr", "rgb"], default="bgr", help="channel order of the frames; bgr as cameras give it")
    add("--opset", type=positive_int, metavar="N", help="ONNX operator set (default: 18, which TensorRT 10 and 11 and ONNX Runtime since 1.15 read; another only for a program that asks for it)")
    add("--data", metavar="SPEC", help=f"where the frames for the proof come from: {SPEC_HELP} (default: what it was trained on); a network from elsewhere gets its classes from there too")
    add("--class-map", type=Path, metavar="FILE", help="for a network from elsewhere whose classes are not those of the data: see train/distill.py --help")
    # fmt: on
    add("--frames", type=positive_int, metavar="N", default=16, help="how many frames the proof takes")
    add_json_flag(parser)
    args = parser.parse_args(argv)
    name = str(args.network or newest_checkpoint(role="student") or "")
    if not name:
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
    from aicsd_deploy.teachers import is_from_elsewhere, open_alone

    ours = not is_from_elsewhere(name)
    if ours:
        if args.class_map is not None:
            raise InputError(f"--class-map is for networks from elsewhere, and {name} has its classes. Leave it out.")
        checkpoint = load_checkpoint(name)
        network, metadata, digest = checkpoint.build(), checkpoint.metadata, sha256(Path(name))
    else:
        found = open_alone(name, args.data, class_map=args.class_map, size_hw=args.image_size)
        network, metadata, digest = found.network, found.metadata, found.digest
    out = args.out or (Path(name).parent if ours else Path()) / f"{metadata.role}.onnx"
    keep_apart(args.json, Path(name), out)
    metadata = metadata.replace(
        image_size_hw=args.image_size or metadata.image_size_hw,
        channel_order=args.channels,
        dynamic=tuple(sorted(set(args.dynamic))),
        provenance=metadata.provenance | {"checkpoint_sha256": digest} | provenance(),
    )
    frames = frames_for_comparison(open_dataset(args.data or metadata.data, "val"), count=args.frames)
    say(f"exporting {name} ({metadata.model}, {metadata.image_size_hw[0]}x{metadata.image_size_hw[1]})")
    with atomic_path(out) as temporary:
        export_onnx(network, metadata, temporary, opset=args.opset or OPSET)
        # The proof runs on the CPU: the reference must not depend on the GPU that happens to be here.
        reference = TorchBackend(network, metadata, device=torch.device("cpu"))
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
    following = shlex.join(["python", "demo/benchmark.py", *([name] if ours else []), str(out)])
    say(f"next: {command_for(metadata.model, following) if ours else following}")
    write_result({"path": str(out), "agreement": asdict(agreement)}, args.json)


if __name__ == "__main__":
    run(main)
