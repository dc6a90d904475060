"""How much memory this process took."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_resident_bytes() -> int | None:
    """Return the peak of this process's resident set; None where the system does not tell.

    On Linux not from getrusage, whose figure a process inherits from its parent.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        status = ""
    for line in status.splitlines():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    try:
        import resource  # which Windows has not
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
