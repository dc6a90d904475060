"""A live source for as long as you like: how old the shown frames are, whether losses are survived, whether memory stays flat.

    python benchmarks/live_soak.py student.onnx --minutes 10 --json docs/results/live_soak.json

It starts tools/rtsp_server.py on loopback (which needs GStreamer's server; that file says how to install it), faster than the
network can follow, kills it now and then, starts it again, and reads from each frame the moment at which it was made.
"""

from __future__ import annotations

import subprocess
import threading
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aicsd_deploy.bench.environment import environment
from aicsd_deploy.cli import Parser, add_json_flag, positive_int, run, write_result
from aicsd_deploy.console import say
from aicsd_deploy.errors import InputError
from aicsd_deploy.runtime.base import UInt8Array, open_backend
from aicsd_deploy.video.overlay import Overlay
from aicsd_deploy.video.pipeline import process_video
from aicsd_deploy.video.sinks import Sink
from aicsd_deploy.video.sources import Frame, open_source
from tools.rtsp_server import BITS, BLOCK_PX

READERS = {
    "ffmpeg": "{}",
    "gstreamer": "rtspsrc location={} latency=0 protocols=tcp ! rtph264depay ! h264parse ! avdec_h264 ! videoconvert",
}
"""`--source` for an address, by what reads it."""
SERVER = Path(__file__).parents[1] / "tools" / "rtsp_server.py"


class Server:
    """The RTSP server, which a thread kills every so often and starts again three seconds later."""

    def __init__(self, python: str, port: int, fps: int, kill_every_s: float) -> None:
        self._command = [python, str(SERVER), "--port", str(port), "--fps", str(fps)]
        self._kill_every_s, self._ended, self.kills = kill_every_s, threading.Event(), 0
        self._start()
        self._thread = threading.Thread(target=self._kill_now_and_then, daemon=True)
        self._thread.start()

    def _start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise InputError(f"The RTSP server did not start. Try: {' '.join(self._command)}")

    def _kill_now_and_then(self) -> None:
        while not self._ended.wait(self._kill_every_s):
            self._process.kill()
            self._process.wait()
            self.kills += 1
            self._ended.wait(3)
            self._start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self._process.kill()
        self._process.wait()


class Watcher(Sink):
    """Notes the true age of each frame, and the memory every ten seconds, until the time is over."""

    name, wants_plain = "watcher", True

    def __init__(self, seconds: float) -> None:
        self._end_s = time.monotonic() + seconds
        self.ages_ms, self.gaps_ms, self.memory_mib = array("d"), array("d"), array("d")
        self._last_s = self._memory_s = 0.0

    def write(self, frame: Frame) -> bool:
        assert frame.plain_bgr is not None
        now_s = time.monotonic()
        self.ages_ms.append((int(now_s * 1000) - clock_in(frame.plain_bgr)) % 2**BITS)
        self.gaps_ms.append(1000 * (now_s - self._last_s) if self._last_s else 0.0)
        self._last_s = now_s
        if now_s - self._memory_s > 10:
            self._memory_s = now_s
            self.memory_mib.append(resident_mib())
        return now_s < self._end_s


def clock_in(image_bgr: UInt8Array) -> int:
    """Read the milliseconds that tools/rtsp_server.py draws into a picture."""
    half = BLOCK_PX // 2
    bits = image_bgr[half, half : half + BITS * BLOCK_PX : BLOCK_PX, 1] > 127
    return int("".join("01"[int(bit)] for bit in bits), 2)


def resident_mib() -> float:
    """Return the memory that this process occupies."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("artifact", type=Path, help="the network to run")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long")
    parser.add_argument("--fps", type=positive_int, default=30, help="pictures that the server sends per second")
    parser.add_argument(
        "--kill-every", type=float, default=120.0, metavar="S", help="seconds between two kills of the server"
    )
    parser.add_argument("--port", type=positive_int, default=8554, help="port of the server on 127.0.0.1")
    parser.add_argument("--threads", type=positive_int, default=1, help="CPU threads for the network")
    parser.add_argument("--through", choices=READERS, default="ffmpeg", help="what reads the stream")
    parser.add_argument("--server-python", default="/usr/bin/python3", help="the Python that has GStreamer's bindings")
    add_json_flag(parser)
    args = parser.parse_args(argv)
    server = Server(args.server_python, args.port, args.fps, args.kill_every)
    try:
        with (
            open_backend(args.artifact, threads=args.threads) as backend,
            open_source(READERS[args.through].format(f"rtsp://127.0.0.1:{args.port}/live")) as source,
        ):
            watcher = Watcher(60 * args.minutes)
            result = process_video(source, backend, watcher, overlay=Overlay(backend.metadata.classes))
    finally:
        server.close()
    write_result(
        report(args.through, args.fps, server, watcher, result.summary()) | {"environment": environment()}, args.json
    )


def report(through: str, fps: int, server: Server, watcher: Watcher, summary: dict[str, Any]) -> dict[str, Any]:
    """Return the figures, and say the ones that matter."""
    ages, memory = np.array(watcher.ages_ms), np.array(watcher.memory_mib)
    infer = summary["latency_ms"]
    limit_ms = 2000 / fps + infer["p50"]
    settled = memory[len(memory) // 5 :]
    found = {
        "read_through": through,
        "fps_sent": fps,
        "server_kills": server.kills,
        "true_age_ms": {f"p{q}": float(np.percentile(ages, q)) for q in (50, 90, 99)} | {"max": float(ages.max())},
        "age_limit_ms": limit_ms,
        "share_over_limit": float((ages > limit_ms).mean()),
        "share_over_limit_with_p99_inference": float((ages > 2000 / fps + infer["p99"]).mean()),
        "longest_gap_ms": float(np.max(watcher.gaps_ms)),
        "memory_mib": {
            "after_a_fifth": float(settled[0]),
            "end": float(settled[-1]),
            "max": float(settled.max()),
            "every_10_s": [round(v) for v in memory],
        },
        **summary,
    }
    say(
        f"{summary['frames_out']} of {summary['frames_in']} frames shown, {summary['reconnects']} reconnections after "
        f"{server.kills} kills; age {found['true_age_ms']['p50']:.0f} ms p50, {found['true_age_ms']['p99']:.0f} p99, "
        f"{found['true_age_ms']['max']:.0f} at most; over {limit_ms:.0f} ms: {100 * found['share_over_limit']:.2f} %; memory "
        f"{settled[0]:.0f} -> {settled[-1]:.0f} MiB"
    )
    return found


if __name__ == "__main__":
    run(main)
