"""Run the whole chain on built-in data: teacher, student without and with it, ONNX file, report, segmented video.

    python demo/quickstart.py

Everything lands in one folder, runs/demo by default; a second run goes on where the first stopped.
"""

from __future__ import annotations

import runpy
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # a checkout that is not installed: cli says what is missing

from aicsd_deploy.cli import Parser, needed_packages, run
from aicsd_deploy.console import percent, say
from aicsd_deploy.errors import AicsdError
from aicsd_deploy.runs import RUNS

with needed_packages():
    from aicsd_deploy.config import DistillConfig, TrainConfig
    from aicsd_deploy.recipes import distill, train_teacher

TEACHER = TrainConfig(epochs=4, val_every=4)
STUDENT = DistillConfig(epochs=5, val_every=5, lr=2e-3)
VIDEO = ("--source", "synthetic", "--max-frames", "150")


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, metavar="DIR", default=RUNS / "demo", help="run folder")
    out: Path = parser.parse_args(argv).out
    started = time.monotonic()
    heading("1/6 teacher")
    teacher = train_teacher(TEACHER, out / "teacher", resume=True)
    heading("2/6 the student on its own, to compare with")
    alone = distill(STUDENT.model_copy(update={"method": "none"}), out / "student-alone", resume=True)
    heading("3/6 the student, distilled with AICSD")
    student = distill(
        STUDENT.model_copy(update={"teacher": str(out / "teacher" / "best.pt")}), out / "student", resume=True
    )
    checkpoints = [str(out / name / "best.pt") for name in ("teacher", "student-alone", "student")]
    heading("4/6 ONNX file")
    command("export/to_onnx.py", checkpoints[-1], "-o", str(out / "student.onnx"))
    heading("5/6 report")
    command("demo/benchmark.py", *checkpoints, str(out / "student.onnx"), "--out", str(out))
    heading("6/6 video")
    command("demo/video.py", *VIDEO, "--engine", str(out / "student.onnx"), "-o", str(out / "video.mp4"))
    say(f"\nDone; this start took {(time.monotonic() - started) / 60:.1f} minutes.")
    say(
        f"teacher {percent(teacher['miou'])} % mIoU, student alone {percent(alone['miou'])} %, student with AICSD "
        f"{percent(student['miou'])} % = {100 * student['miou'] / max(teacher['miou'], 1e-9):.1f} % of its teacher"
    )
    say(f"Look at {out / 'report.html'}, {out / 'video.mp4'} and the pictures in {out / 'student'}.")


def heading(text: str) -> None:
    """Print a line that starts a part."""
    say(f"\n== {text}")


def command(script: str, *arguments: str) -> None:
    """Run one of the other commands, in this process: importing PyTorch anew takes longer than some of them do."""
    say(f"$ python {script} {' '.join(arguments)}")
    own = sys.argv
    path = str(Path(__file__).parents[1] / script)
    sys.argv = [path, *arguments]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        if end.code == 128 + signal.SIGTERM:
            raise
        if end.code:
            raise AicsdError(f"{script} ended with exit code {end.code}; its message stands above.") from end
    finally:
        sys.argv = own


if __name__ == "__main__":
    run(main, parallel=True)
