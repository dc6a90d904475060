"""What all commands share: how flags are read, how errors end them, and the `aicsd` command."""

from __future__ import annotations

import argparse
import json
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from aicsd_deploy import __version__
from aicsd_deploy.console import is_silent, say
from aicsd_deploy.errors import AicsdError, InputError, Preempted
from aicsd_deploy.files import check_writable, write_json

SCRIPTS = {
    "teacher": ("train/teacher.py", "train a teacher"),
    "distill": ("train/distill.py", "distil a student from a teacher"),
    "study": ("train/study.py", "compare distillation methods over several seeds"),
    "evaluate": ("train/evaluate.py", "score an artefact on a data set"),
    "export": ("export/to_onnx.py", "turn a checkpoint into an ONNX file"),
    "int8": ("export/to_int8.py", "turn an ONNX file into INT8"),
    "tensorrt": ("export/to_trt.py", "turn an ONNX file into a TensorRT engine"),
    "benchmark": ("demo/benchmark.py", "measure accuracy and latency of artefacts side by side"),
    "video": ("demo/video.py", "segment a video"),
    "quickstart": ("demo/quickstart.py", "run the whole chain on built-in data"),
}


class Parser(argparse.ArgumentParser):
    """An argument parser that explains itself with the script's docstring and lists every default."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            prog=Path(sys.argv[0]).name,
            description=description,
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        if message.endswith("expected one argument"):
            message += "; write FLAG=VALUE for a value that begins with a dash"
        message = message.replace("invalid int value:", "not a whole number:").replace(
            "invalid float value:", "not a number:"
        )
        say(f"error: {message}\nSee {self.prog} --help for every flag.")
        raise SystemExit(2)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        shown = action.default not in (None, argparse.SUPPRESS, (), []) and action.option_strings
        return text + (" (default: %(default)s)" if shown and action.nargs != 0 else "")


def size_hw(text: str) -> tuple[int, int]:
    """Read "360x480" as (height, width), both in pixels."""
    try:
        height, width = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write HEIGHTxWIDTH, for example 360x480") from None
    if not (16 <= height <= 8192 and 16 <= width <= 8192):
        raise argparse.ArgumentTypeError(f"{text!r} is out of range; height and width must be 16 to 8192 pixels")
    return height, width


def positive_int(text: str) -> int:
    """Read a whole number above zero."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is too small; give 1 or more")
    return value


def shape_nhw(text: str) -> tuple[int, int, int]:
    """Read "4x360x480" as (batch, height, width)."""
    try:
        batch, height, width = (positive_int(part) for part in text.lower().split("x"))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape; write NxHxW, for example 4x360x480") from None
    return batch, height, width


def fraction(text: str) -> float:
    """Read a number from 0 to 1."""
    return _number_to(1, text)


def fraction_of_100(text: str) -> float:
    """Read points of a hundred, 0 to 100, as a fraction: "1" is 0.01."""
    return _number_to(100, text) / 100


def gpu_targets(text: str) -> tuple[str, ...]:
    """Read "sm86,sm89" as what TensorRT-RTX builds for: each once, in small letters."""
    found = tuple(dict.fromkeys(part.strip().lower() for part in text.split(",") if part.strip()))
    if not found:
        raise argparse.ArgumentTypeError(
            "no name is given; leave the flag out, or give one or more, for example sm86,sm89"
        )
    return found


def _number_to(limit: int, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 <= value <= limit:
        raise argparse.ArgumentTypeError(f"{text} is out of range; give 0 to {limit}")
    return value


def device_name(text: str) -> str:
    """Read "auto", "cpu", "cuda" or "cuda:N"."""
    if text in ("auto", "cpu", "cuda") or (text.startswith("cuda:") and text[5:].isdigit()):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is not a device; give auto, cpu, cuda or cuda:N")


def add_runtime_flags(parser: argparse.ArgumentParser, *, threads: str) -> None:
    """Add what `open_backend` takes besides the artefact: --device, --threads (`threads` is its help) and --memory."""
    from aicsd_deploy.runtime.device_memory import OWNERS  # needs numpy, which other commands' --help does not

    parser.add_argument("--device", type=device_name, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=positive_int, metavar="N", help=threads)
    parser.add_argument(
        "--memory",
        choices=("auto", *OWNERS),
        default="auto",
        help="who owns the GPU memory of a TensorRT engine; auto takes the first of the others that works",
    )


def output_file(text: str) -> Path:
    """Read the name of a file to be written, and try now whether it can be, not after hours of work."""
    if text != "-":
        try:
            check_writable(text)
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def add_run_flags(parser: argparse.ArgumentParser, *, folder: str) -> None:
    """Add `--out`, whose default `folder` is to be shown, and `--resume`, which `resumes` reads."""
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"run folder (default: {folder})")
    parser.add_argument(
        "--resume", choices=["no", "auto"], default="no", help="auto: go on with the run in --out if there is one"
    )


def resumes(parser: argparse.ArgumentParser, args: argparse.Namespace) -> bool:
    """Return what `--resume` says; without an --out to go on with, end with a message."""
    if args.resume == "auto" and args.out is None:
        parser.error("--resume auto goes on with the run in --out, and none is named.")
    return bool(args.resume == "auto")


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--json FILE`, which `write_result` serves."""
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write the result as JSON to FILE (- for standard output)"
    )


def keep_apart(result: Path | None, *others: Path) -> None:
    """Raise InputError where `--json`, the file `result`, is one of the others that a command reads or writes."""
    if result is not None and result.resolve() in [path.resolve() for path in others]:
        raise InputError(
            f"--json names the same file as another that this command reads or writes: {result}. Give it another name."
        )


def write_result(result: dict[str, Any], path: Path | None) -> None:
    """Write a command's result where `--json` asked for it."""
    if path is None or is_silent():
        return
    if str(path) == "-":
        print(json.dumps(result, indent=2, allow_nan=False))
    else:
        write_json(path, result)


@contextmanager
def needed_packages() -> Iterator[None]:
    """End the process with one message at Ctrl-C, or where a package that this block imports is missing or broken."""
    try:
        yield
    except ImportError as error:
        _fail(_missing_package(error), 2)
    except KeyboardInterrupt:  # imports take their time
        _fail("interrupted", 130)


def run(command: Callable[[Sequence[str] | None], None], *, parallel: bool = False) -> NoReturn:
    """Run a command and end the process: 0 done, 2 bad input, 3 verification failed, 75 saved and to be started
    again, 130 interrupted, 143 terminated, 1 a fault of ours.

    Args:
        command: what to run.
        parallel: it shares its work between the processes that torchrun starts; of other commands, the first process does all.
    """
    rank = os.environ.get("RANK", "0")
    if not parallel and rank != "0" and os.environ.get("WORLD_SIZE", "1") != "1":
        say(f"process {rank}: nothing to do, since one process does all of this command.")
        sys.exit(0)
    # SIGTERM would end the process here and now, files half written.
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        command(None)
    except Preempted as stop:
        _fail(str(stop), stop.exit_code)
    except AicsdError as error:
        _fail(f"error: {error}", error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except ImportError as error:
        _fail(_missing_package(error), 2)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except MemoryError:
        _fail("error: out of memory. Use a smaller --batch-size or --image-size.", 2)
    except OSError as error:
        _fail(
            f"error: {error.filename or 'a file'}: {error.strerror or error}. Check the path, its rights and the disk.",
            2,
        )
    except Exception as error:
        _fail(
            f"internal error: {type(error).__name__}: {error}\nRun again with --debug for the traceback and report it.",
            1,
        )
    sys.exit(0)


def _missing_package(error: ImportError) -> str:
    if not isinstance(error, ModuleNotFoundError):  # such as OpenCV for desktops on a server, which has no libGL
        return (
            f"error: a package that this command needs cannot be loaded: {error}. Install what it lacks, or the package again in "
            "another form, such as opencv-python-headless for opencv-python."
        )
    return (
        f"error: this command needs the package {error.name!r}, which is not installed for {sys.executable}. In a checkout, make setup "
        "sets up .venv with all that is needed; activate it with . .venv/bin/activate. Else, to train: pip install "
        "'.[train,cpu,headless]'; to export: '.[train,export,cpu,headless]'; to run a student: '.[cpu,video,headless]'."
    )


def _fail(message: str, code: int) -> NoReturn:
    if "--debug" in sys.argv:
        raise  # inside the except block of `run`
    print(message, file=sys.stderr, flush=True)  # of every process: the one that fails may not be the one that speaks
    sys.exit(code)


def main() -> NoReturn:
    """Run `aicsd COMMAND …`: the same scripts that a checkout runs with `python train/distill.py` and so on."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        say("usage: aicsd COMMAND [FLAGS]   (aicsd COMMAND --help explains a command)\n")
        say("\n".join(f"  {name:<11} {text}" for name, (_, text) in SCRIPTS.items()))
        sys.exit(0 if len(sys.argv) > 1 else 2)
    if sys.argv[1] == "--version":
        print(__version__)
        sys.exit(0)
    if sys.argv[1] not in SCRIPTS:
        say(f"error: aicsd has no command {sys.argv[1]!r}; it has {', '.join(SCRIPTS)}.")
        sys.exit(2)
    packaged = Path(__file__).parent / "scripts"
    script = (packaged if packaged.is_dir() else Path(__file__).parents[1]) / SCRIPTS[sys.argv[1]][0]
    sys.argv = [str(script), *sys.argv[2:]]
    runpy.run_path(str(script), run_name="__main__")
    sys.exit(0)
