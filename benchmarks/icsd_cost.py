"""What one ICSD term costs, forward and backward, against a straightforward double loop over class pairs.

Both are written from the equations in aicsd_deploy/losses/icsd.py and give the same value, which is checked first.
They take turns in one run, so that drift of the machine hits both alike; the ratio is the median over the rounds.

    python benchmarks/icsd_cost.py --shape 8x21x129x129 --json docs/results/icsd_cost.json
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from aicsd_deploy.bench.environment import environment
from aicsd_deploy.cli import Parser, add_json_flag, positive_int, run, write_result
from aicsd_deploy.console import say
from aicsd_deploy.losses.icsd import icsd_loss


def double_loop_matrix(logits: Tensor) -> Tensor:
    """Return the (B, C, C) matrix of KL(P_i || P_j), one pair of classes at a time."""
    logp = F.log_softmax(logits.flatten(2), dim=2)
    p = logp.exp()
    rows = []
    for i in range(logits.shape[1]):
        row = [(p[:, i] * (logp[:, i] - logp[:, j])).sum(dim=1) for j in range(logits.shape[1])]
        rows.append(torch.stack(row, dim=1))
    return torch.stack(rows, dim=1)


def double_loop_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return `icsd_loss` (row form), worked out by `double_loop_matrix`."""
    with torch.no_grad():
        target = F.normalize(double_loop_matrix(teacher), dim=2, eps=1e-6)
    return (F.normalize(double_loop_matrix(student), dim=2, eps=1e-6) - target).square().mean()


def seconds(loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor) -> float:
    """Return the time of one forward and backward pass."""
    student.grad = None
    start = time.perf_counter()
    loss(student, teacher).backward()  # type: ignore[no-untyped-call]
    if student.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--shape", default="8x21x129x129", help="logits as BxCxHxW")
    parser.add_argument("--rounds", type=positive_int, default=7, help="rounds of both, after one to warm up")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    add_json_flag(parser)
    args = parser.parse_args(argv)
    shape = [int(part) for part in args.shape.split("x")]
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(shape, generator=generator).to(args.device).requires_grad_()
    teacher = torch.randn(shape, generator=generator).to(args.device)
    difference = abs(icsd_loss(student, teacher).item() - double_loop_loss(student, teacher).item())
    if difference > 1e-6:
        raise AssertionError(f"the two do not work out the same loss: they differ by {difference}")
    pairs = []
    for _ in range(args.rounds + 1):
        pairs.append((seconds(icsd_loss, student, teacher), seconds(double_loop_loss, student, teacher)))
    ours, loop = torch.tensor(pairs[1:], dtype=torch.float64).unbind(dim=1)
    result = {
        "shape": args.shape,
        "rounds": args.rounds,
        "ours_ms": 1e3 * ours.median().item(),
        "double_loop_ms": 1e3 * loop.median().item(),
        "ratio": (loop / ours).median().item(),
        "environment": environment(),
    }
    say(
        f"ours {result['ours_ms']:.1f} ms, double loop {result['double_loop_ms']:.1f} ms: {result['ratio']:.1f} times as long"
    )
    write_result(result, args.json)


if __name__ == "__main__":
    run(main)
