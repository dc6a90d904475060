"""The flags of demo/video.py, and the sinks that they stand for."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from aicsd_deploy.cli import Parser, add_json_flag, add_runtime_flags, keep_apart, positive_int
from aicsd_deploy.console import say
from aicsd_deploy.errors import InputError, MissingDependencyError
from aicsd_deploy.metadata import SegClass
from aicsd_deploy.runtime.base import SUFFIXES
from aicsd_deploy.runtime.frames import FITS
from aicsd_deploy.video.label_sinks import PngSink, RleSink
from aicsd_deploy.video.preview import PreviewSink
from aicsd_deploy.video.sinks import VIDEO_SUFFIXES, Sink, WindowSink, require_display
from aicsd_deploy.video.sources import without_file_scheme


def parse(description: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags of the command line.

    Raises:
        InputError: an output has a suffix that stands for nothing.
        MissingDependencyError: there is no display for --window.
    """
    parser = _parser(description)
    args = parser.parse_args(argv)
    if args.source:
        args.source = without_file_scheme(args.source)
    _check_names(parser, args)
    _check_audio(parser, args)
    if args.split and (args.labels is None or Path(args.labels).is_dir()):
        parser.error(f"--split {args.split} chooses images of a data set, and --labels names none")
    _check_outputs(parser, args)
    if args.window:
        require_display()
    return args


def _parser(description: str | None) -> Parser:
    parser = Parser(description)
    add = parser.add_argument
    add(
        "--engine",
        type=Path,
        metavar="ARTIFACT",
        help=".onnx, .plan or .pt file; without it the newest student of runs/",
    )
    add(
        "--source",
        help='video file, folder of pictures, camera number, rtsp:// or http:// address, GStreamer pipeline ("v4l2src ! '
        'videoconvert"), or synthetic; without it the first camera, else the built-in scene',
    )
    add("--loop", action="store_true", help="begin anew when the file, folder or scene ends")
    add(
        "-o",
        "--output",
        type=Path,
        action="append",
        metavar="OUT",
        help="what to write; may be given several times: a video (.mp4, .mkv, .mov), labels as run lengths (.jsonl), or a "
        "folder for label maps (no suffix)",
    )
    add("--audio", action="store_true", help="copy the sound of the source file into the video")
    add("--window", action="store_true", help="show the video in a window; q or Esc ends")
    add(
        "--preview",
        type=address,
        nargs="?",
        const=False,
        metavar="HOST:PORT",
        help="show the video in browsers, at 127.0.0.1:8765 if no address is given; without -o, --window and --preview: a "
        "window where there is a display, else this",
    )
    add("--opacity", type=opacity, default=0.55, help="0 shows only the frame, 1 only the class colours")
    add("--contour", action="store_true", help="draw only the borders of the classes")
    add("--classes", metavar="A,B", type=class_names, help="show only these classes (default: all)")
    add("--no-hud", action="store_true", help="draw neither the figures nor the legend")
    add(
        "--smooth",
        type=frames_to_last,
        metavar="N",
        default=1,
        help="a class that comes out of nothing must last N frames; against flicker",
    )
    add(
        "--fit",
        choices=FITS,
        default="stretch",
        help="how a frame gets to the network's size: as training does, with its aspect kept, or in overlapping tiles",
    )
    add(
        "--labels",
        metavar="LABELS",
        help="score the video: a data set whose images are its frames (camvid:PATH, folder:PATH), or a folder of label maps",
    )
    add("--split", choices=("train", "val", "test"), help="which images of the data set --labels (default: val)")
    add_runtime_flags(parser, threads="CPU threads for each copy of the network (default: the cores are shared out)")
    add(
        "--in-flight",
        type=positive_int,
        metavar="N",
        help="frames of a file in the network at once (default: 2 on a GPU, one per core up to 4 on a CPU)",
    )
    add(
        "--max-frames",
        type=positive_int,
        metavar="N",
        help="stop when N frames have been shown or written; those that a live source drops do not count",
    )
    add_json_flag(parser)
    add("stray", nargs="*", help=argparse.SUPPRESS)
    return parser


def _check_names(parser: Parser, args: argparse.Namespace) -> None:
    """End with a message where a network was given as the source, or the like."""
    if args.stray:
        flag = "--engine" if is_artifact(args.stray[0]) else "--source"
        if flag == "--source" and args.source:  # as of a name with spaces, or *.png, which the shell writes out
            parser.error(
                f"{args.stray[0]} stands alone, and --source is {args.source} already: put a name with spaces in quotes, and "
                "give the folder of several pictures"
            )
        parser.error(f"{args.stray[0]} stands alone: write {flag} {args.stray[0]}, and a name with spaces in quotes")
    if args.source and is_artifact(args.source):
        parser.error(
            f"{args.source} is a network, not a video: write --engine {args.source}, and the video after --source"
        )
    if args.engine and is_video(args.engine):
        parser.error(
            f"{args.engine} is a video, not a network: write --source {args.engine}, and the network after --engine"
        )


def _check_audio(parser: Parser, args: argparse.Namespace) -> None:
    if not args.audio:
        return
    if not any(is_video(path) for path in args.output or ()):
        parser.error("--audio needs a video to copy the sound into: -o OUT.mp4")
    if args.source is None or args.source == "synthetic":
        parser.error("--audio needs a file with sound: --source FILE")
    if args.loop:
        parser.error("--audio copies the sound once: leave out --audio or --loop")


def _check_outputs(parser: Parser, args: argparse.Namespace) -> None:
    if len({path.resolve() for path in args.output or ()}) < len(args.output or ()):
        parser.error("two -o name the same file")
    keep_apart(args.json, *(args.output or ()), Path(args.source or ""), args.engine or Path())
    for path in args.output or ():
        nameless = path.name.lower() in ("-", ".jsonl", *VIDEO_SUFFIXES)
        if nameless or not (is_video(path) or path.suffix.lower() in ("", ".jsonl") or path.is_dir()):
            raise InputError(
                f"Cannot write {path}: the output must end in {', '.join(VIDEO_SUFFIXES)} (a video) or .jsonl (labels as run "
                "lengths), or have no suffix (a folder for label maps)."
            )


def open_sinks(args: argparse.Namespace, classes: Sequence[SegClass], *, title: str) -> list[Sink]:
    """Return the sinks that the flags ask for, none of them open yet; without flags a window, else the preview.

    Raises:
        InputError: an output cannot be written.
        MissingDependencyError: there is no display for --window, or no PyAV for a video.
    """
    sinks: list[Sink] = []
    for path in args.output or ():
        if is_video(path):
            from aicsd_deploy.video.video_writer import Mp4Sink  # here, since it needs PyAV

            sinks.append(Mp4Sink(path, audio_of=args.source if args.audio else None))
        elif path.suffix.lower() == ".jsonl":
            sinks.append(RleSink(path, classes))
        else:
            sinks.append(PngSink(path, classes))
    if args.window:
        sinks.append(WindowSink())
    if args.preview is not None:
        sinks.append(PreviewSink(classes, address=args.preview or None, opacity=args.opacity, title=title))
    if not sinks and args.labels is None:
        sinks.append(_some_view(classes, args.opacity, title))
    return sinks


def _some_view(classes: Sequence[SegClass], opacity: float, title: str) -> Sink:
    try:
        return WindowSink()
    except MissingDependencyError:
        say("There is no -o and no window can open here: this shows the video in a browser (--preview).")
        return PreviewSink(classes, opacity=opacity, title=title)


def is_video(path: Path) -> bool:
    """Tell whether an output is a video, by its suffix."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def is_artifact(name: str) -> bool:
    """Tell whether a name is that of a network, by its suffix."""
    return Path(name).suffix.lower() in SUFFIXES


def only_watched(args: argparse.Namespace) -> bool:
    """Tell whether nothing is written or scored, so that there is no reason to end early."""
    return not args.output and args.labels is None


MOST_COPIES = 4


def share_cores(
    *, device: str, live: bool, in_flight: int | None = None, threads: int | None = None
) -> tuple[int, int | None]:
    """Return how many copies of the network take turns, and the CPU threads of each, where the flags leave that open.

    On a CPU, copies with few threads each get through a file sooner than one copy with many: convolutions do not share out
    perfectly, and a core that one frame leaves idle works on another. A live frame would only be older for it, so there one
    copy gets all cores but one, which decodes, draws and encodes. On a GPU two copies overlap copying with computing.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform.startswith("linux") else os.cpu_count() or 1
    if live:
        return 1, threads or max(1, cores - 1)
    if device.startswith("cuda"):
        return in_flight or 2, threads
    copies = in_flight or (1 if threads else min(cores, MOST_COPIES))
    return copies, threads or max(1, cores // copies)


def opacity(text: str) -> float:
    """Read a fraction from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an opacity; give a number from 0 to 1")
    return value


def class_names(text: str) -> list[str]:
    """Read names with commas between them."""
    return [name.strip() for name in text.split(",")]


def frames_to_last(text: str) -> int:
    """Read a number of frames from 1 to 100."""
    value = positive_int(text)
    if value > 100:
        raise argparse.ArgumentTypeError(f"{text} frames are too many; give 1 to 100")
    return value


def address(text: str) -> tuple[str, int]:
    """Read "8080", "0.0.0.0:8080" or "[::1]:8080"."""
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an address; give PORT or HOST:PORT, for example 0.0.0.0:8765"
        )
    return host.strip("[]") or "127.0.0.1", int(port)
