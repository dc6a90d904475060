"""How busy the processor and the GPU are, for people who watch."""

from __future__ import annotations

import shutil
import subprocess
import threading
from pathlib import Path

_JETSON = (Path("/sys/devices/platform/gpu.0/load"), Path("/sys/devices/gpu.0/load"))  # in tenths of a percent


class LoadMeter:
    """Looks at the load of the whole machine every two seconds, in a thread of its own.

    Attributes:
        cpu_percent: of all cores together; None where the system does not tell (other than Linux).
        gpu_percent: of the first GPU; None where there is none.
    """

    def __init__(self) -> None:
        self.cpu_percent: float | None = None
        self.gpu_percent: float | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="load", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        before = _cpu_ticks()
        while not self._ended.wait(2.0):
            after = _cpu_ticks()
            if before is not None and after is not None and after[1] > before[1]:
                self.cpu_percent = 100 * (after[0] - before[0]) / (after[1] - before[1])
            before = after
            self.gpu_percent = _gpu_percent()


def _cpu_ticks() -> tuple[int, int] | None:
    """Return the ticks that all cores were busy, and all ticks, since the system started."""
    try:
        ticks = [int(part) for part in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)  # less idle and waiting for disks


def _gpu_percent() -> float | None:
    for path in _JETSON:
        try:
            return int(path.read_text()) / 10
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            return None
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout.split()
        return float(answer[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
