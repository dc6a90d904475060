"""Segment a video with a network: class colours over the frames, with a legend, the speed and the latency.

Without flags it runs the newest student under runs/ on the built-in scene and writes video.mp4 beside it.

    python demo/video.py --engine runs/my/student.onnx --source drive.mp4 -o drive_segmented.mp4
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from aicsd_deploy.cli import Parser, add_json_flag, device_name, positive_int, run, write_result
from aicsd_deploy.console import say, table


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, build the parts, run the pipeline, say what came of it."""
    args = parse(argv)
    # Here, so that --help is quick and a missing package is told like any other error.
    from aicsd_deploy.runs import newest_artifact
    from aicsd_deploy.runtime.base import open_backend
    from aicsd_deploy.video.overlay import Overlay
    from aicsd_deploy.video.pipeline import process_video
    from aicsd_deploy.video.sinks import Mp4Sink, Sink, WindowSink
    from aicsd_deploy.video.sources import open_source

    engine = args.engine or newest_artifact()
    if args.source is None:
        say("No --source is given: this shows the built-in street scene (--source synthetic).")
    sink: Sink = WindowSink() if args.window else Mp4Sink(args.output or engine.with_name("video.mp4"))
    with open_backend(engine, device=args.device, threads=args.threads) as backend:
        height, width = backend.metadata.image_size_hw
        enlarge = -(-360 // height)  # the built-in scene is drawn large enough to look at
        with open_source(args.source or "synthetic", synthetic_hw=(height * enlarge, width * enlarge)) as source:
            say(f"{source.name} -> {engine} ({backend.name} on {backend.device}) -> {sink.name}")
            overlay = Overlay(backend.metadata.classes, opacity=args.opacity)
            result = process_video(source, backend, sink, overlay=overlay, max_frames=args.max_frames)
            named = {"backend": backend.name, "source": source.name, "output": sink.name}
    write_result(result.summary() | named, args.json)
    say(table(["ms per frame", *result.latency_ms()], [["", *(f"{ms:.1f}" for ms in result.latency_ms().values())]]))
    damaged = f", {result.skipped} damaged ones left out" if result.skipped else ""
    say(f"{result.frames_out} of {result.frames_in} frames at {result.fps:.1f} fps{damaged}")
    say(sink.name if result.frames_out else "Nothing was written.")
    if result.interrupted and not source.live and not args.window:
        raise KeyboardInterrupt


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "--engine",
        type=Path,
        metavar="ARTIFACT",
        help=".onnx, .plan or .pt file; without it the newest student of runs/",
    )
    add("--source", help="video file, folder of pictures, camera number, or synthetic (the default), a built-in scene")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("-o", "--output", type=Path, metavar="FILE", help="video to write: .mp4, .mkv or .mov")
    where.add_argument("--window", action="store_true", help="show the video instead of writing it; q or Esc ends")
    add("--opacity", type=opacity, default=0.55, help="0 shows only the frame, 1 only the class colours")
    add("--device", type=device_name, default="auto", help="auto, cpu, cuda or cuda:N")
    add("--threads", type=positive_int, metavar="N", help="CPU threads for the network")
    add("--max-frames", type=positive_int, metavar="N", help="stop after N frames")
    add_json_flag(parser)
    return parser.parse_args(argv)


def opacity(text: str) -> float:
    """Read a fraction from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an opacity; give a number from 0 to 1")
    return value


if __name__ == "__main__":
    run(main)
