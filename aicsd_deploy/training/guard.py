"""Steps whose loss is no number or has exploded: found on the device, kept out of the weights, named for the user."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

EXPLODED = 100.0
"""Cross-entropy this many times its running mean has exploded; the weighted sum grows by itself where ALW shifts the weights."""
SMALL = 0.1
"""A running mean below this counts as this: to a network that knows its images well, one odd batch is 100 times the others."""
MEMORY = 0.98
"""Share of the old value in the running mean of cross-entropy."""


@dataclass(frozen=True)
class BrokenStep:
    """A step that changed nothing, because its loss or gradient could not be used."""

    step: int
    values: dict[str, float]
    """Loss, gradient norm and each term, before weighting."""

    def __str__(self) -> str:
        spoilt = [name for name, value in self.values.items() if not math.isfinite(value)]
        shown = ", ".join(f"{name} {value:g}" for name, value in self.values.items())
        what = f"no longer a number: {', '.join(spoilt)}" if spoilt else "the loss has exploded"
        return f"step {self.step}: {what} ({shown})"


class StepGuard:
    """Undoes broken steps without asking the device, and tells which there were when somebody asks.

    The optimiser is fused and so takes `found_inf` (as it does from a gradient scaler): a tensor that, where it is 1, lets
    the kernel leave weights and moments alone. Statistics of batch normalisation are put back likewise.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self._buffers = [b for b in network.buffers() if b.is_floating_point()]
        self._saved: list[Tensor] = []
        self._mean = torch.full((), torch.inf, device=device)
        self._seen: list[tuple[int, list[str], Tensor]] = []

    def before(self) -> None:
        """Remember the statistics before a step's forward pass."""
        self._saved = [buffer.clone() for buffer in self._buffers]

    def judge(self, step: int, values: dict[str, Tensor], *, scaled: bool) -> Tensor:
        """Return whether a step is to be skipped, float32 0 or 1 on the device, and remember its values.

        Args:
            step: optimiser steps done before.
            values: "loss", "gradient" and "ce", which decide, and the other terms, which are only reported.
            scaled: gradients were scaled for float16; one that overflows is the scaler's business, and nothing is broken.
        """
        names, row = list(values), torch.stack([value.detach().float() for value in values.values()])
        loss, ce, gradient = (values[name].detach().float() for name in ("loss", "ce", "gradient"))
        broken = ~torch.isfinite(loss) | (ce > EXPLODED * self._mean.clamp(min=SMALL))
        overflown = ~torch.isfinite(gradient)
        if not scaled:
            broken = broken | overflown
        running = torch.where(torch.isfinite(self._mean), MEMORY * self._mean + (1 - MEMORY) * ce, ce)
        self._mean = torch.where(broken | (ce == 0), self._mean, running)  # it is 0 where nothing is labelled
        self._seen.append((step, names, torch.cat([broken.float().view(1), row])))
        skip = broken | overflown
        for buffer, saved in zip(self._buffers, self._saved, strict=True):
            torch.where(skip, saved, buffer, out=buffer)
        return skip.float()

    def broken_steps(self) -> list[BrokenStep]:
        """Return the broken steps since the last call; on a GPU this waits for it."""
        seen, self._seen = self._seen, []
        rows = torch.stack([row for _, _, row in seen]).tolist() if seen else []
        return [
            BrokenStep(step, dict(zip(names, row[1:], strict=True)))
            for (step, names, _), row in zip(seen, rows, strict=True)
            if row[0]
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self._mean.item()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._mean.fill_(state["mean"])
