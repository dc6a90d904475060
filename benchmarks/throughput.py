"""One distillation step, ours against a straightforward one, and ours without the teacher.

The straightforward step is written from the description of AICSD (arXiv 2308.04243) as it is commonly put into code: float32,
the teacher in training mode inside the graph, a double loop over the pairs of classes (one triangle, mirrored). Ours is the
step that train/distill.py takes. The three take turns in one run, so that drift of the machine hits all alike; ratios are
medians over the rounds. On a GPU memory is what a step allocates at its peak, plus the weights and moments it needs.

    python benchmarks/throughput.py --image-size 513x513 --batch-size 8 --device cuda --json throughput.json
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aicsd_deploy.bench.environment import environment
from aicsd_deploy.cli import Parser, add_json_flag, device_name, positive_int, run, size_hw, write_result
from aicsd_deploy.config import DistillConfig, MethodConfig
from aicsd_deploy.console import say, table
from aicsd_deploy.data.loader import Batch
from aicsd_deploy.distiller import Distiller, cross_entropy
from aicsd_deploy.losses.pixel_kd import pixel_kd_loss
from aicsd_deploy.metadata import Metadata, SegClass
from aicsd_deploy.models import build_model
from aicsd_deploy.models.deploy import Normalize
from aicsd_deploy.runtime.torch_backend import choose_device
from aicsd_deploy.training.precision import autocast_dtype, lowered
from aicsd_deploy.training.step import TrainStep

STEP, TOTAL = 50, 100  # in the middle of a training, where no term of AICSD weighs nothing


def looped_matrix(logits: Tensor) -> Tensor:
    """Return KL(P_i || P_j), (B, C, C), one pair of classes after the other; the other triangle is mirrored."""
    logp = F.log_softmax(logits.flatten(2), dim=2)
    p, classes = logp.exp(), logits.shape[1]
    matrix = logits.new_zeros(logits.shape[0], classes, classes)
    for i in range(classes):
        for j in range(i + 1, classes):
            matrix[:, i, j] = matrix[:, j, i] = (p[:, i] * (logp[:, i] - logp[:, j])).sum(dim=1)
    return matrix


class Straightforward:
    """The step as commonly written."""

    def __init__(self, student: nn.Module, teacher: nn.Module, config: DistillConfig) -> None:
        self.student, self.teacher = student.train(), teacher.train()
        self.optimizer = torch.optim.SGD(student.parameters(), lr=config.lr, momentum=0.9)
        self.config = config

    def __call__(self, batch: Batch) -> None:
        logits, target = self.student(batch.images_BCHW), self.teacher(batch.images_BCHW)
        ics = (looped_matrix(logits) - looped_matrix(target)).square().mean()  # gradients flow into the teacher here
        alpha = STEP / TOTAL
        labelled = alpha * (cross_entropy(logits, batch.labels_BHW) + self.config.lambda_icsd * ics)
        loss = labelled + (1 - alpha) * self.config.lambda_kd * pixel_kd_loss(logits, target)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        loss.item()  # for the log, at every step


class Ours:
    """The step of train/distill.py."""

    def __init__(
        self,
        network: nn.Module,
        student: nn.Module,
        teacher: nn.Module | None,
        config: DistillConfig,
        device: torch.device,
    ) -> None:
        dtype = autocast_dtype(config.precision, device)
        frozen = None if teacher is None else lowered(teacher.eval(), dtype)
        method = MethodConfig(method="none" if teacher is None else "aicsd")
        loss = Distiller(student.train(), frozen, method, autocast=dtype)
        if config.compile:
            for module in (student, frozen):
                if module is not None:
                    module.compile()
        self.step = TrainStep(network, loss, config, device, autocast=dtype)
        self.optimizer = self.step.optimizer

    def __call__(self, batch: Batch) -> None:
        self.step(batch, step=STEP, total=TOTAL, logs=False)
        self.step.clock.restart()  # a training reads it every --log-every steps
        if batch.images_BCHW.device.type == "cpu":
            self.step.guard.broken_steps()  # as a training does there at every step


def build(
    name: str, classes: int, size: tuple[int, int], device: torch.device, *, fast: bool
) -> tuple[nn.Module, nn.Module]:
    """Return a network and the same with its normalisation in front."""
    torch.manual_seed(0)
    network = build_model(name, num_classes=classes).to(device)
    if fast:
        network = network.to(memory_format=torch.channels_last)
    metadata = Metadata(name, tuple(SegClass(str(i), (0, 0, 0)) for i in range(classes)), size)
    return network, nn.Sequential(Normalize(metadata), network).to(device)


def measure(step: Callable[[Batch], None], batch: Batch, device: torch.device) -> tuple[float, float]:
    """Return the seconds of one step, upload included, and the bytes it allocates at its peak (0 on the CPU)."""
    cuda, before = device.type == "cuda", 0
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    step(batch.to(device))
    if not cuda:
        return time.perf_counter() - start, 0
    torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() - before


def held_bytes(modules: Iterable[nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """Return the size of weights, statistics and moments."""
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return sum(t.nbytes for t in tensors)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--teacher", default="deeplabv3plus_resnet101", help="the teacher's network")
    parser.add_argument("--student", default="deeplabv3plus_resnet18", help="the student's network")
    parser.add_argument("--image-size", type=size_hw, default=(129, 129), metavar="HxW", help="size of the crops")
    parser.add_argument("--batch-size", type=positive_int, default=4, help="images per step")
    parser.add_argument("--classes", type=positive_int, default=21, help="classes")
    parser.add_argument("--rounds", type=positive_int, default=7, help="rounds of all three, after two to warm up")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="of our steps")
    parser.add_argument("--compile", action="store_true", help="compile our networks")
    parser.add_argument("--device", type=device_name, default="auto", help="auto, cpu, cuda or cuda:N")
    add_json_flag(parser)
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    torch.backends.cudnn.benchmark = True
    config = DistillConfig(optimizer="sgd", batch_size=args.batch_size, precision=args.precision, compile=args.compile)

    def network(name: str, *, fast: bool = True) -> tuple[nn.Module, nn.Module]:
        return build(name, args.classes, args.image_size, device, fast=fast)

    plain_student, plain_teacher = network(args.student, fast=False)[1], network(args.teacher, fast=False)[1]
    teacher = network(args.teacher)[1]
    steps: dict[str, Any] = {
        "straightforward": Straightforward(plain_student, plain_teacher, config),
        "ours": Ours(*network(args.student), teacher, config, device),
        "ours without teacher": Ours(*network(args.student), None, config, device),
    }
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch_size, 3, *args.image_size)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, args.classes, (shape[0], *shape[2:]), generator=generator, dtype=torch.uint8)
    batch = Batch(images, labels).pin_memory() if device.type == "cuda" else Batch(images, labels)
    rounds = []
    for number in range(args.rounds + 2):
        rounds.append([measure(step, batch, device) for step in steps.values()])
        say(
            f"round {number}: "
            + ", ".join(f"{n} {1e3 * s:.0f} ms" for n, (s, _) in zip(steps, rounds[-1], strict=True))
        )
    seconds, peaks = torch.tensor(rounds[2:], dtype=torch.float64).unbind(dim=2)
    held = [
        held_bytes([plain_student, plain_teacher], steps["straightforward"].optimizer),
        held_bytes([steps["ours"].step.network, teacher], steps["ours"].optimizer),
        held_bytes([steps["ours without teacher"].step.network], steps["ours without teacher"].optimizer),
    ]
    memory = [h + peak for h, peak in zip(held, peaks.amax(dim=0).tolist(), strict=True)]
    times = seconds.median(dim=0).values.tolist()
    result = {
        "teacher": args.teacher,
        "student": args.student,
        "image_size_hw": list(args.image_size),
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        "device": str(device),
        "precision": str(autocast_dtype(config.precision, device) or "float32"),
        "compile": args.compile,
        "steps": {
            name: {
                "ms": 1e3 * time_s,
                "images_per_s": args.batch_size / time_s,
                "memory_gib": used / 2**30 if device.type == "cuda" else None,
            }
            for name, time_s, used in zip(steps, times, memory, strict=True)
        },
        "times_as_fast": (seconds[:, 0] / seconds[:, 1]).median().item(),
        "share_of_memory": memory[1] / memory[0] if device.type == "cuda" else None,
        "cost_of_distillation": (seconds[:, 1] / seconds[:, 2]).median().item(),
        "environment": environment(),
    }
    rows = [
        [
            name,
            f"{r['ms']:.0f}",
            f"{r['images_per_s']:.2f}",
            "–" if r["memory_gib"] is None else f"{r['memory_gib']:.2f}",
        ]
        for name, r in result["steps"].items()
    ]
    say(table(["step", "ms", "img/s", "memory, GiB"], rows))
    say(
        f"ours is {result['times_as_fast']:.2f} times as fast as the straightforward step, and takes "
        f"{result['cost_of_distillation']:.2f} times as long as without the teacher"
    )
    write_result(result, args.json)


if __name__ == "__main__":
    run(main)
