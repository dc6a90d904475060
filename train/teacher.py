"""Train a teacher: a network that learns from labels alone.

    python train/teacher.py --data camvid:/data/CamVid --model deeplabv3plus_resnet101 --image-size 360x480 --out runs/teacher

The run folder holds best.pt, last.pt, metrics.jsonl, tensorboard/, curves.png, confusion.png, overlays.png, summary.json.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # a checkout that is not installed: cli says what is missing

from aicsd_deploy.cli import (
    Parser,
    add_json_flag,
    add_run_flags,
    keep_apart,
    needed_packages,
    resumes,
    run,
    write_result,
)
from aicsd_deploy.console import say
from aicsd_deploy.runs import new_run_folder

with needed_packages():
    from aicsd_deploy.config import TrainConfig, add_config_flags, read_config
    from aicsd_deploy.data.check import check_dataset, check_splits, write_overlays
    from aicsd_deploy.data.spec import open_dataset


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    add_config_flags(parser, TrainConfig)
    add_run_flags(parser, folder="runs/TIME-teacher-MODEL")
    parser.add_argument(
        "--check-data",
        action="store_true",
        help="only look at the data: ids, pixels per class, and a few overlays where --out is given",
    )
    add_json_flag(parser)
    args = parser.parse_args(argv)
    resume = resumes(parser, args)
    config = read_config(TrainConfig, args)
    out = args.out or new_run_folder(f"teacher-{config.model}")
    keep_apart(args.json, out / "best.pt", out / "last.pt")
    if args.check_data:
        reports = {}
        for split in ("train", "val"):
            dataset = open_dataset(config.data, split)
            report = check_dataset(dataset)
            reports[split] = report.to_dict()
            say(report.to_text())
            if args.out is not None:
                say("\n".join(str(path) for path in write_overlays(dataset, args.out)))
        check_splits(open_dataset(config.data, "train"), open_dataset(config.data, "val"))
        write_result(reports, args.json)
        return
    # Only now, since importing torch and torchvision takes seconds: wrong flags are told at once.
    from aicsd_deploy.models import command_for
    from aicsd_deploy.recipes import train_teacher

    summary = train_teacher(config, out, resume=resume)
    write_result(summary, args.json)
    following = shlex.join(["python", "train/distill.py", "--data", config.data, "--teacher", str(out / "best.pt")])
    say(f"run folder: {out}\nnext: {command_for(summary['model'], following)}")


if __name__ == "__main__":
    run(main, parallel=True)
