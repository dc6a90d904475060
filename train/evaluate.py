"""Score an artefact (.pt, .onnx, .plan) on a data set: mIoU, IoU of each class, pixel accuracy, mean class accuracy.

    python train/evaluate.py student.onnx --data camvid:/data/CamVid --split val --json scores.json
    python train/evaluate.py teacher.pt --data cityscapes:/data/Cityscapes --native --window 768x768 --scales 0.75,1,1.25 --flip

Scores are at the size of the labels, from one confusion matrix over all images. Without the flags of the protocol the artefact
is scored as it is deployed: frames resized to its size, labels resized back.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # a checkout that is not installed: cli says what is missing

from aicsd_deploy.cli import (
    Parser,
    add_json_flag,
    add_runtime_flags,
    keep_apart,
    needed_packages,
    run,
    size_hw,
    write_result,
)
from aicsd_deploy.console import percent, say, table
from aicsd_deploy.errors import InputError
from aicsd_deploy.runs import newest_artifact

with needed_packages():
    from aicsd_deploy.data.spec import SPEC_HELP, SPLITS, open_dataset
    from aicsd_deploy.evaluate import FrameToLabels, evaluate
    from aicsd_deploy.runtime.base import Backend, open_backend


def scales(text: str) -> tuple[float, ...]:
    """Read "0.75,1,1.25"."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} are no scales; write numbers with commas, for example 0.75,1,1.25"
        ) from None
    if not all(0.1 <= scale <= 4 for scale in found):
        raise argparse.ArgumentTypeError(f"{text}: scales must be 0.1 to 4")
    return found


def by_protocol(args: argparse.Namespace, backend: Backend, protocol: dict[str, Any]) -> FrameToLabels:
    """Return what segments frames as the flags of the protocol say."""
    if args.artifact is None or args.artifact.suffix != ".pt":
        raise InputError(
            "--native, --window, --scales and --flip need probabilities and other sizes, which an exported file does not give. "
            "Name a checkpoint (.pt)."
        )
    from aicsd_deploy.checkpoint import load_checkpoint  # needs torch, which scoring an exported file does not
    from aicsd_deploy.protocol import Protocol, ProtocolSegmenter
    from aicsd_deploy.runtime.torch_backend import choose_device

    network = load_checkpoint(args.artifact).build()
    return ProtocolSegmenter(network, backend.metadata, Protocol(**protocol), device=choose_device(args.device))


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "artifact", type=Path, nargs="?", help="a .pt, .onnx or .plan file (default: the newest student under runs/)"
    )
    parser.add_argument("--data", metavar="SPEC", help=f"{SPEC_HELP} (default: what the artefact was trained on)")
    parser.add_argument("--split", choices=SPLITS, default="val", help="which images")
    add_runtime_flags(parser, threads="CPU threads for the network (default: as the runtime chooses)")
    protocol = parser.add_argument_group("protocol of papers (checkpoints only)")
    protocol.add_argument("--native", action="store_true", help="show images at their own size")
    protocol.add_argument("--window", type=size_hw, metavar="HxW", help="in overlapping windows of this size, averaged")
    protocol.add_argument("--scales", type=scales, metavar="A,B,…", default="1", help="at these scales, averaged")
    protocol.add_argument("--flip", action="store_true", help="mirrored too, averaged")
    add_json_flag(parser)
    args = parser.parse_args(argv)
    artifact = args.artifact or newest_artifact()
    keep_apart(args.json, artifact)
    how = {"device": args.device, "threads": args.threads, "memory": args.memory}
    with open_backend(artifact, **how) as backend:
        dataset = open_dataset(args.data or backend.metadata.data, args.split)
        say(f"{backend.name} on {backend.device}, {dataset.spec} ({args.split}), {len(dataset)} images")
        segmenter, extra = None, {}
        if args.native or args.window or args.flip or args.scales != (1.0,):
            used = {"native": args.native, "window_hw": args.window, "scales": args.scales, "flip": args.flip}
            segmenter, extra = by_protocol(args, backend, used), {"protocol": used}
        scores = evaluate(backend, dataset, segmenter=segmenter).scores(backend.metadata.class_names)
    say(table(["class", "IoU, %"], [[name, percent(iou)] for name, iou in scores.per_class_iou.items()]))
    say(
        f"mIoU {percent(scores.miou)} %, pixel accuracy {percent(scores.pixel_accuracy)} %, "
        f"mean class accuracy {percent(scores.mean_class_accuracy)} % ({scores.images} images)"
    )
    write_result(scores.to_dict() | extra, args.json)


if __name__ == "__main__":
    run(main)
