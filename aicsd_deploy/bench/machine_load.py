"""What else the machine did while something was measured."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from aicsd_deploy.bench.environment import cpuinfo

BUSY_OTHERS, STOLEN = 0.1, 0.02


@dataclass
class MachineLoad:
    """Processor time used by others during a measurement; None where the system does not tell.

    Attributes:
        others_cores: cores that other processes kept busy, on average.
        stolen_share: part of the time in which the hypervisor gave the processors to somebody else.
        mhz_before, mhz_after: clock of the fastest core.
    """

    others_cores: float | None = None
    stolen_share: float | None = None
    mhz_before: float | None = None
    mhz_after: float | None = None

    def noise(self) -> list[str]:
        """Return what disturbed the measurement, in words."""
        found = []
        if self.others_cores is not None and self.others_cores > BUSY_OTHERS:
            found.append(f"other processes kept {self.others_cores:.1f} cores busy")
        if self.stolen_share is not None and self.stolen_share > STOLEN:
            found.append(f"the hypervisor took {100 * self.stolen_share:.0f} % of the time")
        return found


@contextmanager
def watch_machine() -> Iterator[MachineLoad]:
    """Yield a `MachineLoad` that is filled in when the block ends. Source of the counters: proc(5), /proc/stat."""
    load = MachineLoad(mhz_before=_mhz())
    before, own, start = _jiffies(), _own_seconds(), time.monotonic()
    yield load
    after, elapsed = _jiffies(), time.monotonic() - start
    load.mhz_after = _mhz()
    if before is None or after is None or elapsed < 0.1:
        return
    per_second = os.sysconf("SC_CLK_TCK")
    busy, stolen = ((b - a) / per_second for a, b in zip(before, after, strict=True))
    load.others_cores = round(max(0.0, busy - (_own_seconds() - own)) / elapsed, 3)
    load.stolen_share = round(stolen / elapsed / (os.cpu_count() or 1), 4)


def _jiffies() -> tuple[float, float] | None:
    """Return the busy and the stolen time of all processors since the start, in clock ticks."""
    try:
        fields = [float(v) for v in Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:9]]
        user, nice, system, _idle, _wait, interrupts, soft, stolen = fields
    except (OSError, ValueError):
        return None
    return user + nice + system + interrupts + soft, stolen


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _mhz() -> float | None:
    return max(map(float, cpuinfo("cpu MHz")), default=None)
