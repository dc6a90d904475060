"""Compare distillation methods: the same recipe, weights and order of images for each, over several seeds.

    python train/study.py --methods none,kd,aicsd --seeds 0,1,2 --out runs/study
    python train/study.py --config configs/study_camvid.yaml --data camvid:/data/CamVid --teacher runs/teacher/best.pt --out runs/study

Each cell (one method, one seed) is a run folder under OUT/cells. The same command goes on where it was stopped, and adds the
cells of methods and seeds that are new. To use several machines or GPUs, give each its own seeds and the same --out.
OUT holds study.json, study.md, curves.png, classes.png and strip.png.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # a checkout that is not installed: cli says what is missing

from aicsd_deploy.cli import Parser, add_json_flag, needed_packages, run, write_result
from aicsd_deploy.console import say
from aicsd_deploy.files import write_json, write_text
from aicsd_deploy.runs import new_run_folder

with needed_packages():
    from aicsd_deploy.config import DistillConfig, add_config_flags, read_config
    from aicsd_deploy.data.spec import open_dataset
    from aicsd_deploy.study.config import StudyConfig


def names(text: str) -> list[str]:
    """Read "none,kd,aicsd"."""
    return [part.strip() for part in text.split(",") if part.strip()]


def seeds(text: str) -> list[int]:
    """Read "0,1,2"."""
    try:
        return [int(part) for part in names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} are no seeds; write whole numbers with commas, for example 0,1,2"
        ) from None


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    for name, kind, example in (("methods", names, "none,kd,aicsd"), ("seeds", seeds, "0,1,2")):
        text = f"{StudyConfig.model_fields[name].description} (default: those of --config, else {example})"
        parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, metavar="A,B,…", help=text)
    add_config_flags(parser, DistillConfig, renamed={"model": "student"}, without={"method", "seed"})
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the study (default: runs/TIME-study)")
    add_json_flag(parser)
    args = parser.parse_args(argv)
    config = read_config(StudyConfig, args)
    # Only now, since importing torch and torchvision takes seconds: wrong flags are told at once.
    from aicsd_deploy.runtime.torch_backend import choose_device
    from aicsd_deploy.study.cells import run_study
    from aicsd_deploy.study.plots import draw_strip, plot_study
    from aicsd_deploy.study.results import summarize, to_markdown
    from aicsd_deploy.training import distributed

    distributed.start(choose_device(config.device))
    # The main process's: a folder that is named by the time may be another in each.
    out = distributed.from_main(args.out or new_run_folder("study"))
    study = summarize(config, run_study(config, out))
    page = to_markdown(study, shlex.join(["python", "train/study.py", *sys.argv[1:]]))
    write_json(out / "study.json", study)
    write_text(out / "study.md", page)
    pictures = [*plot_study(study, out), draw_strip(study, open_dataset(config.data, "val"), out)]
    write_result(study, args.json)
    say(page)
    say("\n".join(str(path) for path in [out / "study.json", out / "study.md", *pictures]))


if __name__ == "__main__":
    run(main, parallel=True)
