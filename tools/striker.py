"""Runs trainings that end abruptly at a chosen moment, each in a fork of this process, which has only imported.

    python tools/striker.py CASES   CASES is JSON: [{"argv": [...], "cwd": "...", "at": "replace", "n": 2, "after": false,
                                                  "signal": 9}, ...]

`at` names what the n-th call of is struck: replace (a file is renamed), step, validate or write (a checkpoint is written);
null lets the run end by itself. Prints the exit codes as JSON.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter  # noqa: F401  imported once, here

import aicsd_deploy.checkpoint
import aicsd_deploy.evaluate
import aicsd_deploy.recipes
import aicsd_deploy.training.step

PLACES = {
    "replace": (Path, "replace"),
    "step": (torch.optim.Optimizer, "zero_grad"),
    "validate": (aicsd_deploy.evaluate, "segment"),
    "write": (torch, "save"),
}


def strike(case: dict[str, Any]) -> None:
    """Send this process and those it started the signal at the n-th call of what the case names."""
    owner, name = PLACES[case["at"]]
    original, calls = getattr(owner, name), 0

    def struck(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == case["n"] and not case["after"]:
            os.killpg(0, case["signal"])
        result = original(*args, **kwargs)
        if calls == case["n"] and case["after"]:
            os.killpg(0, case["signal"])
        return result

    setattr(owner, name, struck)


def run(case: dict[str, Any]) -> None:
    os.setpgrp()  # schedulers send signals to all processes of a job, those that load data among them
    os.chdir(case["cwd"])
    sys.path.insert(0, case["cwd"])
    sys.stderr = sys.stdout = Path("output.txt").open("a")  # noqa: SIM115  for the rest of the process
    torch.set_num_threads(1)
    if case.get("at"):
        strike(case)
    sys.argv = case["argv"]
    runpy.run_path(sys.argv[0], run_name="__main__")


def main() -> None:
    codes = []
    for case in json.loads(sys.argv[1]):
        child = os.fork()
        if child == 0:
            try:
                run(case)
            except SystemExit as end:
                sys.stdout.flush()
                os._exit(end.code if isinstance(end.code, int) else 1)
            os._exit(0)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        print(f"{len(codes)}: {case.get('at')} {case.get('n')}: {codes[-1]}", file=sys.stderr, flush=True)
    print(json.dumps(codes))


if __name__ == "__main__":
    main()
