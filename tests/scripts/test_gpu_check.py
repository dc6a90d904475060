"""tools/gpu_check.py: a part that fails, crashes or hangs leaves the others alone."""

from __future__ import annotations

import operator
import os
import time

import pytest

pytestmark = pytest.mark.slow


def test_each_part_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from tools import gpu_check

    assert "ZeroDivisionError" in gpu_check.alone(operator.truediv, 1, 0)["error"]
    assert gpu_check.alone(os._exit, 3) == {"error": "the process ended with code 3"}
    start = time.monotonic()
    for limit_s in (0, 20):  # while the process is starting, and mostly after
        monkeypatch.setattr(gpu_check, "LIMIT_S", limit_s)
        assert gpu_check.alone(time.sleep, 600) == {"error": f"not done after {limit_s} s"}
    assert time.monotonic() - start < 500, "it is not waited for"
