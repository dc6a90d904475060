"""Distil a student from a teacher with AICSD: inter-class similarity distillation and adaptive loss weighting.

    python train/distill.py
    python train/distill.py --data camvid:/data/CamVid --teacher runs/teacher/best.pt --student lraspp_mobilenetv2 --out runs/student

Without flags: the built-in street scenes, and the newest teacher for them under runs/ (one is trained first if there is none).
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
from aicsd_deploy.console import percent, say
from aicsd_deploy.runs import new_run_folder

with needed_packages():
    from aicsd_deploy.config import DistillConfig, add_config_flags, read_config


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    add_config_flags(parser, DistillConfig, renamed={"model": "student"})
    add_run_flags(parser, folder="runs/TIME-STUDENT-METHOD")
    add_json_flag(parser)
    args = parser.parse_args(argv)
    resume = resumes(parser, args)
    config = read_config(DistillConfig, args)
    out = args.out or new_run_folder(f"{config.model}-{config.method}")
    keep_apart(args.json, out / "best.pt", out / "last.pt", Path(config.teacher or ""))
    # Only now, since importing torch and torchvision takes seconds: wrong flags are told at once.
    from aicsd_deploy.models import command_for
    from aicsd_deploy.recipes import distill

    summary = distill(config, out, resume=resume)
    write_result(summary, args.json)
    if summary["teacher"] is not None:
        share = summary["miou"] / max(summary["teacher"]["miou"], 1e-9)
        say(
            f"teacher {percent(summary['teacher']['miou'])} %, student {percent(summary['miou'])} %: {100 * share:.1f} % of its teacher"
        )
    if "imitated_int8_miou" in summary:
        say(
            f"with INT8 imitated: {percent(summary['imitated_int8_miou'])} %; export/to_int8.py tells what the real one has"
        )
    following = shlex.join(["python", "export/to_onnx.py", str(out / "best.pt")])
    say(f"run folder: {out}\nnext: {command_for(summary['model'], following)}")


if __name__ == "__main__":
    run(main, parallel=True)
