"""What viewers of the browser preview cost the pipeline: frames per second with none and with several, in turns.

    python benchmarks/preview_viewers.py student.onnx --source drive.mp4 --viewers 5 --json docs/results/preview_viewers.json

The pipeline writes an mp4 and offers the preview, as fast as it can. A viewer is a program in another process that asks for
frame after frame as the page does, but does not draw them: that is the browser's work, on the viewer's own machine.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from aicsd_deploy.bench.environment import environment
from aicsd_deploy.cli import Parser, add_json_flag, positive_int, run, write_result
from aicsd_deploy.console import say
from aicsd_deploy.runtime.base import open_backend
from aicsd_deploy.video.flags import share_cores
from aicsd_deploy.video.overlay import Overlay
from aicsd_deploy.video.pipeline import process_video
from aicsd_deploy.video.preview import PreviewSink
from aicsd_deploy.video.sinks import SinkGroup
from aicsd_deploy.video.sources import open_source
from aicsd_deploy.video.video_writer import Mp4Sink


def watch(port: int, seen: list[int]) -> None:
    """Ask for frames until there are no more, and note how many came."""
    connection, after, count = http.client.HTTPConnection("127.0.0.1", port), 0, 0
    try:
        while True:
            connection.request("GET", f"/frame?after={after}")
            answer = connection.getresponse()
            answer.read()
            if answer.status == 410:
                break
            if answer.status == 200:
                after = json.loads(answer.getheader("X-Frame") or "")["number"]
                count += 1
    except OSError:
        pass
    seen.append(count)


def watch_all(port: int, viewers: int) -> None:
    """Run viewers side by side; print how many frames each of them got."""
    seen: list[int] = []
    threads = [threading.Thread(target=watch, args=(port, seen)) for _ in range(viewers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(*seen)


def main(argv: Sequence[str] | None = None) -> None:
    if sys.argv[1:2] == ["--watch"]:
        watch_all(int(sys.argv[2]), int(sys.argv[3]))
        return
    parser = Parser(__doc__)
    parser.add_argument("artifact", type=Path, help="the network to run")
    parser.add_argument("--source", required=True, metavar="FILE", help="the video")
    parser.add_argument("--viewers", type=positive_int, default=5, help="how many")
    parser.add_argument("--rounds", type=positive_int, default=3, help="rounds of both, after one to warm up")
    parser.add_argument("--max-frames", type=positive_int, default=300, help="frames of a run")
    parser.add_argument(
        "--threads",
        type=positive_int,
        default=share_cores(device="cpu", live=True)[1],
        help="CPU threads for the network",
    )
    add_json_flag(parser)
    args = parser.parse_args(argv)
    pairs: list[list[float]] = []
    seen: list[int] = []
    with open_backend(args.artifact, threads=args.threads) as backend, tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds + 1):
            pairs.append([])
            for viewers in (0, args.viewers):
                classes = backend.metadata.classes
                preview = PreviewSink(classes, address=("127.0.0.1", 0))
                port = preview.url.rstrip("/").rpartition(":")[2]
                command = [sys.executable, __file__, "--watch", port, str(viewers)]
                with open_source(args.source, loop=True) as source:
                    watchers = subprocess.Popen(command, stdout=subprocess.PIPE, text=True) if viewers else None
                    sink = SinkGroup([Mp4Sink(Path(folder) / "out.mp4"), preview])
                    result = process_video(source, backend, sink, overlay=Overlay(classes), max_frames=args.max_frames)
                pairs[-1].append(result.fps)
                if watchers is not None:
                    seen = [int(part) for part in watchers.communicate()[0].split()]
    without, watched = np.array(pairs[1:]).T
    loss = float(np.median(1 - watched / without))
    say(
        f"{np.median(without):.1f} fps without viewers, {np.median(watched):.1f} with {args.viewers}: {100 * loss:.1f} % less; "
        f"a viewer got {min(seen)} to {max(seen)} of {args.max_frames} frames"
    )
    found = {
        "viewers": args.viewers,
        "threads": args.threads,
        "fps_without": without.tolist(),
        "fps_with": watched.tolist(),
        "median_loss": loss,
        "frames_seen_by_each": seen,
    }
    write_result(found | {"environment": environment()}, args.json)


if __name__ == "__main__":
    run(main)
