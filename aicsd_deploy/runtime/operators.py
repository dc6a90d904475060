"""What a runtime's profiler lists, operator by operator, added up to the stages of a frame."""

from __future__ import annotations

import re
from collections.abc import Sequence

_HEAVY = re.compile("Conv(?!ert)|MatMul|Gemm|FullyConnected")
"""Operators with one of these in their name are the network; what runs before or after all of them is not."""
_COPIES = {"MemcpyFromHost": "host_to_device", "MemcpyToHost": "device_to_host"}


def stages(operators: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Add one run's operators, (type, milliseconds) in their order, up to the stages of `Backend.time_stages`."""
    heavy = [i for i, (kind, _) in enumerate(operators) if _HEAVY.search(kind)]
    if not heavy:
        return {}
    times: dict[str, float] = {"preprocessing": 0.0, "network": 0.0, "postprocessing": 0.0}
    for i, (kind, milliseconds) in enumerate(operators):
        inside = "network" if i <= heavy[-1] else "postprocessing"
        stage = _COPIES.get(kind, "preprocessing" if i < heavy[0] else inside)
        times[stage] = times.get(stage, 0.0) + milliseconds
    return times
