"""Segment a video with a network: class colours over the frames, with a legend, the speed and the latency.

Without flags it shows the newest student under runs/ on the first camera, or on the built-in scene, in a window or a browser.

    python demo/video.py --engine runs/my/student.onnx --source drive.mp4 -o drive_segmented.mp4
    python demo/video.py --source rtsp://192.168.1.20/stream --preview
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # a checkout that is not installed: cli says what is missing

from aicsd_deploy.cli import needed_packages, run, write_result
from aicsd_deploy.console import percent, say, table
from aicsd_deploy.errors import InputError

with needed_packages():
    from aicsd_deploy.runs import newest_artifact
    from aicsd_deploy.runtime.base import open_backend
    from aicsd_deploy.video.flags import only_watched, open_sinks, parse, share_cores
    from aicsd_deploy.video.overlay import Overlay
    from aicsd_deploy.video.pipeline import VideoResult, process_video
    from aicsd_deploy.video.scoring import Scorer, true_labels
    from aicsd_deploy.video.sinks import SinkGroup
    from aicsd_deploy.video.sources import open_source


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, build the parts, run the pipeline, say what came of it."""
    args = parse(__doc__, argv)
    engine = args.engine or newest_artifact(fast=True)
    with open_backend(engine, device=args.device, memory=args.memory) as first:
        about, device, concurrency = first.metadata, first.device, first.concurrency
    show = {"opacity": args.opacity, "shown": args.classes, "contour": args.contour, "legend": not args.no_hud}
    overlay = Overlay(about.classes, **show)
    with ExitStack() as opened:
        enlarge = -(-360 // about.image_size_hw[0])  # the built-in scene is drawn large enough to look at
        scene_hw = (about.image_size_hw[0] * enlarge, about.image_size_hw[1] * enlarge)
        source = opened.enter_context(
            open_source(args.source, synthetic_hw=scene_hw, endless=only_watched(args), loop=args.loop)
        )
        copies, threads = share_cores(device=device, live=source.live, in_flight=args.in_flight, threads=args.threads)
        loaded = [
            opened.enter_context(open_backend(engine, device=args.device, threads=threads, memory=args.memory))
            for _ in range(1 if concurrency > 1 else copies)  # an engine runs several frames at once by itself
        ]
        backends = [loaded[i % len(loaded)] for i in range(copies)]
        if args.source is None:
            what = "the first camera" if source.live else "the built-in street scene, since there is no camera"
            say(f"No --source is given: this shows {what}.")
        scorer = None
        if args.labels is not None:
            true = true_labels(args.labels, args.split or "val", about.classes)
            scorer = Scorer(*true, about.class_names, max_frames=args.max_frames)
        sinks = open_sinks(args, about.classes, title=f"{about.model} {about.precision}")
        sink = SinkGroup([*sinks, *([scorer] if scorer else [])])
        say(f"{source.name} -> {engine} ({backends[0].name} on {device}) -> {sink.name}")
        result = process_video(
            source, backends, sink, overlay=overlay, fit=args.fit, smooth=args.smooth, max_frames=args.max_frames
        )
        named = {
            "engine": str(engine),
            "backend": backends[0].name,
            "precision": about.precision,
            "in_flight": copies,
            "threads": threads,
            "source": source.name,
            "output": sink.name,
            "smooth": args.smooth,
            "scores": scorer.result() if scorer and result.frames_out else None,
        }
    report(result, named)
    if scorer and result.ended == "end":
        scorer.warn_of_the_rest()
    written = ", ".join(map(str, args.output or ()))
    if written:
        say(written if result.frames_out else "Nothing was written.")
    write_result(result.summary() | named, args.json)  # last: where it fails, the rest has been said
    if result.ended == "lost":
        kept = f" What came before is kept in {written}." if written else ""
        raise InputError(f"{source.name} was lost and did not come back.{kept}")
    if result.interrupted and not source.live and not sink.paced:
        say("interrupted")
        sys.exit(128 + (result.signal or signal.SIGINT))  # as a shell and a service manager know it


def report(result: VideoResult, named: dict[str, Any]) -> None:
    """Say what came of the run."""
    say(table(["ms per frame", *result.latency_ms()], [["", *(f"{ms:.1f}" for ms in result.latency_ms().values())]]))
    damaged = f", {result.skipped} damaged ones left out" if result.skipped else ""
    say(f"{result.frames_out} of {result.frames_in} frames at {result.fps:.1f} fps{damaged}")
    if result.age_ms.size:
        ages = result.summary()["age_ms"]
        say(
            f"age of a frame when shown: {ages['p50']:.0f} ms p50, {ages['p99']:.0f} ms p99, {ages['max']:.0f} ms at most"
        )
    if scores := named["scores"]:
        flicker = percent(scores["flicker_rate"])
        say(
            f"mIoU {percent(scores['miou'])} %, flicker {flicker} % of the pixels per frame ({scores['images']} frames)"
        )


if __name__ == "__main__":
    run(main)
