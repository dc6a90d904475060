"""What tests/training/test_distributed.py starts with torchrun: a training, and one that is asked to stop in one process."""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import aicsd_deploy.training.step as step_module
from aicsd_deploy import trainer
from aicsd_deploy.data.spec import open_dataset
from aicsd_deploy.runtime.torch_backend import TorchBackend
from aicsd_deploy.training import distributed
from aicsd_deploy.training.validation import evaluate_together


def run(script: str, *arguments: str) -> int:
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def validated_statistics(script: str, arguments: list[str]) -> list[float]:
    """Train a network with batch normalisation for an epoch; return the statistics that this process validated."""
    good, found = trainer.evaluate_together, []

    def looks(backend: TorchBackend, *args: Any, **kwargs: Any) -> Any:
        found.append(dict(backend._module.network.named_buffers())["1.running_mean"].tolist())
        return good(backend, *args, **kwargs)

    trainer.evaluate_together = looks  # type: ignore[attr-defined]
    epoch = [*arguments, "--student", "tiny_network:with_statistics", "--epochs", "1", "--out", "statistics"]
    assert run(script, *epoch) == 0
    trainer.evaluate_together = good  # type: ignore[attr-defined]
    return found[-1]  # type: ignore[no-any-return]


def main() -> None:
    script, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    codes = [run(script, *arguments, "--out", "two")]
    backend = TorchBackend.open(Path("one/best.pt"), device="cpu")
    counts = evaluate_together(backend, open_dataset("folder:data", "val"), title="").counts.tolist()

    scored = validated_statistics(script, arguments)
    good, calls = step_module.lr_share, []

    def asks_rank_1_to_stop(*args: int) -> float:
        calls.append(1)
        if len(calls) == 7 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return good(*args)

    step_module.lr_share = asks_rank_1_to_stop
    codes.append(run(script, *arguments, "--out", "asked"))
    Path(f"rank{distributed.rank()}.json").write_text(json.dumps({"codes": codes, "counts": counts, "scored": scored}))


if __name__ == "__main__":
    main()
