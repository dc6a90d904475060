"""Kill a small distillation again and again, damage its files, fill its disk: it must end as one that was left alone.

    python tools/torture.py --kills 30 --json docs/results/torture.json

Kills are SIGKILL and SIGTERM, in a step, in a validation, while a checkpoint is written, and before or after a file is
renamed; each is followed by --resume auto. Exit code 3: weights, log lines or TensorBoard events differ.
The full disk is a small tmpfs, which only root can mount; without it that part is left out, and said so.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from aicsd_deploy.bench.environment import environment
from aicsd_deploy.cli import Parser, add_json_flag, positive_int, run, write_result
from aicsd_deploy.console import say
from aicsd_deploy.data.spec import open_dataset
from aicsd_deploy.errors import VerificationError

REPO = Path(__file__).parents[1]
COMMON = "--data folder:data --batch-size 4 --image-size 48x64 --warmup-steps 4 --threads 1 --log-every 1 --resume auto"
TEACHER = f"{COMMON} --model small_network:small --epochs 2 --out teacher"
STUDENT = f"{COMMON} --student small_network:small --teacher teacher/best.pt --epochs 75 --val-every 2 --save-every 3 --ema 0.9 --accumulate 2"
NETWORK = """
from torch import nn

def small(num_classes):
    first = nn.Sequential(nn.Conv2d(3, 64, 5, stride=4, padding=2), nn.BatchNorm2d(64), nn.ReLU(), nn.Dropout(0.1))
    second = nn.Sequential(nn.Conv2d(64, 256, 3, padding=1), nn.BatchNorm2d(256), nn.ReLU())
    return nn.Sequential(first, second, nn.Conv2d(256, num_classes, 1))
"""
"""A network whose steps take milliseconds, with the parts whose state is easily lost: statistics and dropout."""
PLACES = {"step": (4, 9), "validate": (5, 12), "write": (1, 4), "replace": (1, 5)}
"""Where a run is struck, and the range of the call; validation calls include 4 that score the teacher."""


def write_data(root: Path) -> None:
    """Write 16 training and 4 validation images of the built-in scenes as a `folder:` data set."""
    for split, count in (("train", 16), ("val", 4)):
        dataset = open_dataset("synthetic:48x64", split)
        for kind in ("images", "labels"):
            (root / split / kind).mkdir(parents=True)
        for index in range(count):
            image, labels = dataset.load(index)
            Image.fromarray(image).save(root / split / "images" / f"{index}.png")
            Image.fromarray(labels).save(root / split / "labels" / f"{index}.png")
    lines = [f"{i} {c.name} {' '.join(map(str, c.color_rgb))}" for i, c in enumerate(dataset.classes)]
    (root / "classes.txt").write_text("\n".join(lines))


def case(work: Path, out: str, **strike: Any) -> dict[str, Any]:
    """Return what tells striker.py to run the distillation into `out`, or the teacher's training, struck as `strike` says."""
    script, flags = ("teacher", TEACHER) if out == "teacher" else ("distill", f"{STUDENT} --out {out}")
    return {"argv": [str(REPO / f"train/{script}.py"), *flags.split()], "cwd": str(work), **strike}


def call(cases: list[dict[str, Any]]) -> list[int]:
    """Run cases one after the other and return their exit codes, minus the signal where one killed them."""
    result = subprocess.run(
        [sys.executable, str(REPO / "tools/striker.py"), json.dumps(cases)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "AICSD_TRUST": "small_network:small"},
        check=True,
    )
    codes: list[int] = json.loads(result.stdout)
    return codes


def require(work: Path, codes: list[int], *wanted: int) -> None:
    """Raise VerificationError unless the last codes are those wanted."""
    if codes != list(wanted):
        raise VerificationError(f"exit codes {codes}, not {list(wanted)}: {(work / 'output.txt').read_text()[-2000:]}")


def require_same(work: Path, out: str) -> None:
    """Raise VerificationError unless a run ended as `whole` did."""
    for name in ("best.pt", "last.pt"):
        a, b = (torch.load(work / folder / name, weights_only=True) for folder in ("whole", out))
        tensors = [flat(content["model"]) + flat(content["training"]) for content in (a, b)]
        if not all(torch.equal(x, y) for x, y in zip(*tensors, strict=True)):
            raise VerificationError(f"{out}/{name} is not that of the uninterrupted run")
    if lines(work / "whole") != lines(work / out):
        raise VerificationError(f"{out}/metrics.jsonl is not that of the uninterrupted run")
    if events(work / "whole") != events(work / out):
        raise VerificationError(f"the TensorBoard events of {out} are not those of the uninterrupted run")
    if left := [path.name for path in (work / out).glob(".*")]:
        raise VerificationError(f"{out} still holds {left}")


def flat(value: Any) -> list[torch.Tensor]:
    """Return all tensors in nested dictionaries and lists: weights, moments, running mean."""
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in inner for tensor in flat(item)]


def lines(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of the log without what the clock says."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("speed", "step_ms")} for line in found]


def events(folder: Path) -> list[tuple[int, float]]:
    """Return step and value of the loss as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it reports what a resumed run purges

    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars("loss")]


def kill_again_and_again(work: Path, kills: int, seed: int) -> dict[str, int]:
    """Strike one run `kills` times, let it end, and return how often each kind of kill was made."""
    rng, cases = random.Random(seed), []
    for _ in range(kills):
        place, number = rng.choice(list(PLACES)), rng.choice([signal.SIGKILL, signal.SIGTERM])
        strike = {"at": place, "n": rng.randint(*PLACES[place]), "after": rng.random() < 0.5, "signal": int(number)}
        cases.append(case(work, "killed", **strike))
    codes = call([*cases, case(work, "killed")])
    require(work, codes, *(75 if c["signal"] == signal.SIGTERM else -signal.SIGKILL for c in cases), 0)
    require_same(work, "killed")
    return dict(sorted(Counter(f"{signal.Signals(c['signal']).name}, {c['at']}" for c in cases).items()))


def damage(work: Path) -> list[str]:
    """Cut off and flip a bit in last.pt of runs on their way."""
    strike = {"at": "step", "n": 31, "after": False, "signal": int(signal.SIGKILL)}
    require(work, call([case(work, "cut", **strike)]), -signal.SIGKILL)
    shutil.copytree(work / "cut", work / "flipped")
    content = bytearray((work / "cut/last.pt").read_bytes())
    (work / "cut/last.pt").write_bytes(content[: len(content) // 3])
    content[len(content) // 2] ^= 1
    (work / "flipped/last.pt").write_bytes(content)
    require(work, call([case(work, "cut"), case(work, "flipped")]), 0, 0)
    for out in ("cut", "flipped"):
        require_same(work, out)
    if (work / "output.txt").read_text().count("it is damaged") < 2:
        raise VerificationError("the damage was not noticed")
    return ["last.pt cut off", "last.pt with one flipped bit"]


def fill_disk(work: Path) -> str:
    """Run on a tmpfs that has room for one state and a half, then give it room."""
    disk = work / "disk"
    disk.mkdir()
    size = int(1.6 * (work / "whole/last.pt").stat().st_size)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        return "left out: only root can mount a tmpfs"
    try:
        require(work, call([case(work, "disk/run")]), 2)
        step = torch.load(disk / "run/last.pt", weights_only=True)["training"]["step"]
        said = [line for line in (work / "output.txt").read_text().splitlines() if "cannot be written" in line][-1]
        subprocess.run(["mount", "-o", f"remount,size={20 * size}", str(disk)], check=True)
        require(work, call([case(work, "disk/run")]), 0)
        require_same(work, "disk/run")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)
    return f"stopped with the state of step {step} whole, and went on: {said.replace(str(work), '')}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--kills", type=positive_int, default=30, help="how often the run is killed")
    parser.add_argument("--seed", type=int, default=0, help="seed of places, moments and signals")
    add_json_flag(parser)
    args = parser.parse_args(argv)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_data(work / "data")
        (work / "small_network.py").write_text(NETWORK)
        require(work, call([case(work, "teacher"), case(work, "whole")]), 0, 0)
        kills = kill_again_and_again(work, args.kills, args.seed)
        result = {
            "kills": kills,
            "steps": len(events(work / "whole")),
            "damage": damage(work),
            "full disk": fill_disk(work),
            "seconds": round(time.monotonic() - start, 1),
            "environment": environment(),
        }
    say(f"{args.kills} kills, damage and a full disk: all runs ended as the uninterrupted one, to the bit")
    write_result(result, args.json)


if __name__ == "__main__":
    run(main)
