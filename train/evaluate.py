"""Score an artefact (.pt, .onnx) on a data set: mIoU, IoU of each class, pixel accuracy, mean class accuracy.

python train/evaluate.py student.onnx --data camvid:/data/CamVid --split val --json scores.json
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from aicsd_deploy.cli import Parser, add_json_flag, device_name, positive_int, run, write_result
from aicsd_deploy.console import percent, say, table
from aicsd_deploy.data.spec import SPEC_HELP, SPLITS, open_dataset
from aicsd_deploy.evaluate import evaluate
from aicsd_deploy.runs import newest_artifact
from aicsd_deploy.runtime.base import open_backend


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "artifact", type=Path, nargs="?", help="a .pt or .onnx file (default: the newest student under runs/)"
    )
    parser.add_argument("--data", metavar="SPEC", help=f"{SPEC_HELP} (default: what the artefact was trained on)")
    parser.add_argument("--split", choices=SPLITS, default="val", help="which images")
    parser.add_argument("--device", type=device_name, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads for the network")
    add_json_flag(parser)
    args = parser.parse_args(argv)
    with open_backend(args.artifact or newest_artifact(), device=args.device, threads=args.threads) as backend:
        dataset = open_dataset(args.data or backend.metadata.data, args.split)
        say(f"{backend.name} on {backend.device}, {dataset.spec} ({args.split}), {len(dataset)} images")
        scores = evaluate(backend, dataset).scores(backend.metadata.class_names)
    say(table(["class", "IoU, %"], [[name, percent(iou)] for name, iou in scores.per_class_iou.items()]))
    say(
        f"mIoU {percent(scores.miou)} %, pixel accuracy {percent(scores.pixel_accuracy)} %, "
        f"mean class accuracy {percent(scores.mean_class_accuracy)} % ({scores.images} images)"
    )
    write_result(scores.to_dict(), args.json)


if __name__ == "__main__":
    run(main)
