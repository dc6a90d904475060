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
from torch import nn

import aicsd_deploy.training.step as step_module
from aicsd_deploy import trainer
from aicsd_deploy.config import MethodConfig, TrainConfig
from aicsd_deploy.data.loader import Batch
from aicsd_deploy.data.spec import open_dataset
from aicsd_deploy.distiller import Distiller
from aicsd_deploy.metadata import Metadata, SegClass
from aicsd_deploy.models.deploy import Normalize
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


def adapter_and_weight() -> list[float]:
    """Take three steps of ickd on this process's images of a batch; return its adapter, and the weight that --balance found."""
    torch.manual_seed(0)
    pixels = Normalize(Metadata("any", (SegClass("any", (0, 0, 0)),), (16, 16)))
    student, teacher = (
        nn.Sequential(pixels, nn.Conv2d(3, channels, 4, 4), nn.ReLU(), nn.Conv2d(channels, 3, 1)) for channels in (4, 6)
    )
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    labels = torch.randint(0, 3, (4, 16, 16))
    labels[0, 2:] = 255
    settings = MethodConfig(method="ickd", balance=0.5, student_layer="1", teacher_layer="1")
    loss = Distiller(student, teacher, settings, image_size_hw=(16, 16))
    config = TrainConfig(optimizer="sgd", lr=0.1, clip_norm=1e9, warmup_steps=0)
    take = step_module.TrainStep(student, loss, config, torch.device("cpu"), autocast=None)
    loss.student = distributed.parallel(student, torch.device("cpu"))
    share = slice(distributed.rank(), None, distributed.world_size())
    for step in range(3):
        values = take(Batch(images[share], labels[share]), step=step, total=9, logs=True)
    adapter: list[float] = loss.state.get_parameter("adapter.weight").flatten().tolist()
    return [*adapter, values["weight"]["ickd"]]


def main() -> None:
    script, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    codes = [run(script, *arguments, "--out", "two")]
    backend = TorchBackend.open(Path("one/best.pt"), device="cpu")
    counts = evaluate_together(backend, open_dataset("folder:data", "val"), title="").counts.tolist()

    adapter = adapter_and_weight()
    scored = validated_statistics(script, arguments)
    good, calls = step_module.lr_share, []

    def asks_rank_1_to_stop(*args: int) -> float:
        calls.append(1)
        if len(calls) == 7 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return good(*args)

    step_module.lr_share = asks_rank_1_to_stop
    codes.append(run(script, *arguments, "--out", "asked"))
    found = {"codes": codes, "counts": counts, "scored": scored, "adapter": adapter}
    Path(f"rank{distributed.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
