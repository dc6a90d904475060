"""How fast the whole video pipeline is, against its slowest stage alone: in one run, with the same settings.

    python benchmarks/video_throughput.py student.onnx --source drive.mp4 --json docs/results/video_throughput.json

Each round runs the pipeline from file to mp4, then each stage alone over the same frames: decoding a file, the network on
decoded frames, drawing on them, encoding them. The ratio is the median over the rounds of pipeline fps by slowest-stage fps.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from aicsd_deploy.bench.environment import environment
from aicsd_deploy.cli import Parser, add_json_flag, device_name, positive_int, run, write_result
from aicsd_deploy.console import say, table
from aicsd_deploy.runtime.base import Backend, open_backend
from aicsd_deploy.runtime.frames import Segmenter
from aicsd_deploy.video.figures import STAGES
from aicsd_deploy.video.flags import share_cores
from aicsd_deploy.video.overlay import Overlay
from aicsd_deploy.video.pipeline import process_video
from aicsd_deploy.video.sources import Frame, open_source
from aicsd_deploy.video.video_writer import Mp4Sink


def fps_of(work: Callable[[Any], object], items: Iterable[Any]) -> float:
    """Return how many items are worked on per second."""
    start, done = time.perf_counter(), 0
    for item in items:
        work(item)
        done += 1
    return done / (time.perf_counter() - start)


def stages_alone(path: str, backends: Sequence[Backend], count: int, out: Path) -> dict[str, float]:
    """Return the frames per second of each stage that runs alone."""
    with open_source(path) as source:
        decode_fps = fps_of(lambda frame: frame, islice(source, count))
    with open_source(path) as source:
        frames = list(islice(source, count))
        segmenters, overlay = [Segmenter(backend) for backend in backends], Overlay(backends[0].metadata.classes)

        def infer(turn: int) -> list[Frame]:
            mine = frames[turn :: len(segmenters)]
            return [replace(f, labels=segmenters[turn](f.image_bgr)) for f in mine]

        start = time.perf_counter()
        with ThreadPoolExecutor(len(segmenters)) as pool:
            labelled = [frame for part in pool.map(infer, range(len(segmenters))) for frame in part]
        infer_fps = len(labelled) / (time.perf_counter() - start)
        labelled.sort(key=lambda frame: frame.index)
        hud = "31.5 fps   12.4 ms p50   14.1 p99   " + backends[0].name
        render_fps = fps_of(lambda f: overlay.draw(f.image_bgr, f.labels, hud=hud), labelled)
        sink = Mp4Sink(out)
        start = time.perf_counter()
        with sink.open(source):  # its end, which writes out what x264 holds back, counts too
            for frame in labelled:
                sink.write(frame)
        encode_fps = len(labelled) / (time.perf_counter() - start)
    return dict(zip(STAGES, (decode_fps, infer_fps, render_fps, encode_fps), strict=True))


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("artifact", type=Path, help="the network to run")
    parser.add_argument("--source", required=True, metavar="FILE", help="the video")
    parser.add_argument("--device", type=device_name, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=positive_int, help="CPU threads of the network (default: all but one)")
    parser.add_argument(
        "--in-flight", type=positive_int, default=1, help="frames in the network at once, as for demo/video.py"
    )
    parser.add_argument("--max-frames", type=positive_int, default=200, help="frames of a round")
    parser.add_argument("--rounds", type=positive_int, default=3, help="rounds, after one of 20 frames to warm up")
    add_json_flag(parser)
    args = parser.parse_args(argv)
    args.threads = args.threads or share_cores(device="cpu", live=True)[1]
    backends = [open_backend(args.artifact, device=args.device, threads=args.threads) for _ in range(args.in_flight)]
    rounds = []
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "out.mp4"
        for count in [20] + [args.max_frames] * args.rounds:
            with open_source(args.source) as source:
                overlay = Overlay(backends[0].metadata.classes)
                result = process_video(source, backends, Mp4Sink(out), overlay=overlay, max_frames=count)
                size_hw = source.size_hw
            alone = stages_alone(args.source, backends, result.frames_out, out)
            rounds.append((result.fps, alone, {s: float(result.times_ms[s].mean()) for s in STAGES}))
    pipeline = float(np.median([fps for fps, _, _ in rounds[1:]]))
    alone_fps = {s: float(np.median([alone[s] for _, alone, _ in rounds[1:]])) for s in STAGES}
    within_ms = {s: float(np.median([times[s] for _, _, times in rounds[1:]])) for s in STAGES}
    ratio = float(np.median([fps / min(alone.values()) for fps, alone, _ in rounds[1:]]))
    rows = [[s, f"{1000 / alone_fps[s]:.2f}", f"{alone_fps[s]:.1f}", f"{within_ms[s]:.2f}"] for s in STAGES]
    say(table(["stage", "alone, ms", "alone, fps", "in the pipeline, ms"], rows))
    say(f"pipeline {pipeline:.1f} fps: {ratio:.3f} of its slowest stage alone")
    result_json = {
        "backend": backends[0].name,
        "frame_hw": list(size_hw),
        "network_hw": list(backends[0].metadata.image_size_hw),
        "threads": args.threads,
        "in_flight": args.in_flight,
        "frames": args.max_frames,
        "rounds": args.rounds,
        "pipeline_fps": pipeline,
        "alone_fps": alone_fps,
        "in_pipeline_ms": within_ms,
        "ratio_to_slowest": ratio,
        "environment": environment(),
    }
    write_result(result_json, args.json)


if __name__ == "__main__":
    run(main)
