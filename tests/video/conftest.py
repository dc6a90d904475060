"""Fixtures of the video tests; their network and their videos are in video_helpers."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest


@pytest.fixture
def no_threads_left() -> Iterator[None]:
    """Fail a test that leaves a thread of the pipeline behind."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(5)  # one that answers a browser ends by itself once the browser has gone
    left = [thread.name for thread in set(threading.enumerate()) - before]
    assert not left, f"threads left running: {left}"
