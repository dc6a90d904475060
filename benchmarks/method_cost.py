"""What each distillation method adds to a training step: time, and memory that is kept for the backward pass.

The step it is compared with is measured in the same run: forward pass of the teacher, forward and backward pass of the student
with cross-entropy. What a method adds is measured on tensors of the same shapes, without the networks: `Distiller` with the
method minus `Distiller` with cross-entropy alone, forward and backward, in turns; the median over the rounds. So the small
number is not the difference of two large ones.

    python benchmarks/method_cost.py --json docs/results/method_cost.json
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from aicsd_deploy.bench.environment import environment
from aicsd_deploy.cli import Parser, add_json_flag, positive_int, run, size_hw, write_result
from aicsd_deploy.config import MethodConfig
from aicsd_deploy.console import say, table
from aicsd_deploy.data.loader import Batch
from aicsd_deploy.distiller import Distiller, cross_entropy
from aicsd_deploy.models import build_model
from aicsd_deploy.training.precision import autocast_dtype, lowered

STUDENT, TEACHER = "deeplabv3plus_resnet18", "deeplabv3plus_resnet101"
FEATURES = {STUDENT: 512, TEACHER: 2048}
METHODS: dict[str, dict[str, Any]] = {
    "kd": {"method": "kd"},
    "icsd": {"method": "icsd"},
    "icsd + ALW": {"method": "icsd", "alw": "linear"},
    "aicsd (icsd + kd + ALW)": {"method": "aicsd"},
    "cwd": {"method": "cwd"},
    "dist": {"method": "dist"},
    "at": {"method": "at"},
    "sp": {"method": "sp"},
    "ickd": {"method": "ickd"},
}


class Given(nn.Module):
    """Stands for a network: gives the features and logits that it holds."""

    class Backbone(nn.Module):
        def __init__(self, features: Tensor) -> None:
            super().__init__()
            self.features = nn.Parameter(features)

        def forward(self, images: Tensor) -> Tensor:
            return self.features

    def __init__(self, logits: Tensor, features: Tensor) -> None:
        super().__init__()
        self.logits, self.backbone = nn.Parameter(logits), Given.Backbone(features)

    def forward(self, images: Tensor) -> Tensor:
        self.backbone(images)
        return self.logits


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Return the milliseconds that an action takes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def kept_mib(forward: Callable[[], Tensor]) -> float:
    """Return how much memory a forward pass keeps for the backward pass, each block of memory counted once."""
    blocks: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        blocks[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        forward()
    return sum(blocks.values()) / 2**20


def measure_step(batch: Batch, classes: int, rounds: int, device: torch.device) -> tuple[float, float]:
    """Return the milliseconds of the teacher's forward pass, and of the student's step with cross-entropy."""
    dtype = autocast_dtype("auto", device)  # as in a training: bfloat16 on a GPU, float32 on the CPU
    student, teacher = (
        build_model(name, num_classes=classes).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        for name in (STUDENT, TEACHER)
    )
    lowered(teacher.eval(), dtype)
    student.train()
    half = torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
    images = torch.randn(batch.images_BCHW.shape, device=device).contiguous(memory_format=torch.channels_last)

    def look() -> None:
        with torch.no_grad(), half:
            teacher(images)

    def learn() -> None:
        student.zero_grad(set_to_none=True)
        with half:
            logits = student(images)
        cross_entropy(logits, batch.labels_BHW).backward()  # type: ignore[no-untyped-call]

    pairs = [(timed(look, device), timed(learn, device)) for _ in range(rounds + 1)][1:]
    return median([a for a, _ in pairs]), median([b for _, b in pairs])


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--batch-size", type=positive_int, default=8, help="images per step")
    parser.add_argument("--classes", type=positive_int, default=19, help="classes")
    parser.add_argument(
        "--image-size", type=size_hw, default=(513, 513), help="size of the crops; logits have a quarter"
    )
    parser.add_argument("--rounds", type=positive_int, default=7, help="rounds of the methods, after one to warm up")
    parser.add_argument(
        "--step-rounds", type=positive_int, default=3, help="rounds of the whole step, after one to warm up"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    add_json_flag(parser)
    args = parser.parse_args(argv)
    device, size = torch.device(args.device), args.image_size
    torch.backends.cudnn.benchmark = True  # as a training does
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    quarter, sixteenth = [-(-side // 4) for side in size], [-(-side // 16) for side in size]
    logits = [random(args.batch_size, args.classes, *quarter) for _ in range(2)]
    features = [random(args.batch_size, FEATURES[name], *sixteenth).relu() for name in (STUDENT, TEACHER)]
    labels = torch.randint(0, args.classes, (args.batch_size, *size), generator=generator).to(device)
    batch = Batch(torch.zeros(args.batch_size, 3, *size, dtype=torch.uint8, device=device), labels)

    def distiller(settings: dict[str, Any]) -> Distiller:
        teacher = None if settings["method"] == "none" else Given(logits[1], features[1])
        return Distiller(Given(logits[0].clone(), features[0].clone()), teacher, MethodConfig(**settings))

    plain = distiller({"method": "none"})
    others = {name: distiller(settings) for name, settings in METHODS.items()}

    def forward(loss: Distiller) -> Tensor:
        return loss(batch, step=1, total_steps=3).total

    def step(loss: Distiller) -> None:
        loss.student.zero_grad(set_to_none=True)
        forward(loss).backward()  # type: ignore[no-untyped-call]

    added: dict[str, list[float]] = {name: [] for name in others}
    for round_number in range(args.rounds + 1):
        for name, loss in others.items():
            difference = timed(lambda loss=loss: step(loss), device) - timed(lambda: step(plain), device)  # type: ignore[misc]
            if round_number > 0:
                added[name].append(difference)
    base_mib = kept_mib(lambda: forward(plain))
    memory = {name: kept_mib(lambda loss=loss: forward(loss)) - base_mib for name, loss in others.items()}  # type: ignore[misc]
    teacher_ms, student_ms = measure_step(batch, args.classes, args.step_rounds, device)
    whole = teacher_ms + student_ms
    methods = {
        name: {"added_ms": median(times), "share_of_step": median(times) / whole, "kept_mib": memory[name]}
        for name, times in added.items()
    }
    rows = [
        [name, f"{m['added_ms']:.1f}", f"{100 * m['share_of_step']:.2f}", f"{m['kept_mib']:.1f}"]
        for name, m in methods.items()
    ]
    say(table(["method", "added, ms", "% of the step", "kept, MiB"], rows))
    say(f"step: teacher's forward pass {teacher_ms:.0f} ms + student with cross-entropy {student_ms:.0f} ms")
    result = {
        "logits": [args.batch_size, args.classes, *quarter],
        "student": STUDENT,
        "teacher": TEACHER,
        "rounds": args.rounds,
        "step_rounds": args.step_rounds,
        "teacher_forward_ms": teacher_ms,
        "student_step_ms": student_ms,
        "methods": methods,
        "device": args.device,
        "environment": environment(),
    }
    write_result(result, args.json)


if __name__ == "__main__":
    run(main)
