"""What every artefact (.pt, .onnx, .plan) says about itself: classes, colours, input contract, origin, scores."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
import unicodedata
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from aicsd_deploy import __version__
from aicsd_deploy.errors import InputError

SCHEMA_VERSION = 1
ONNX_KEY = "aicsd_deploy"
TRUST_VARIABLE = "AICSD_TRUST"
"""The environment variable in which the user lists, with commas, the code that files may have run; see `is_trusted`."""
IGNORE_LABEL = 255
"""The label value that no loss, score or picture counts, in every data set once it is loaded."""

ChannelOrder = Literal["bgr", "rgb"]


@dataclass(frozen=True)
class SegClass:
    """One class: its name and the colour that labels of it are drawn in (red, green, blue, each 0 to 255)."""

    name: str
    color_rgb: tuple[int, int, int]

    def __post_init__(self) -> None:
        """Raise ValueError where the name would do something to a terminal that it is printed on."""
        plain_text(self.name)


@dataclass(frozen=True)
class Metadata:
    """What an artefact says about itself.

    Attributes:
        model: the network's name, as `build_model` takes it.
        classes: the classes in the order of the label values.
        image_size_hw: height and width of the frames that the network works on, in pixels.
        channel_order: the order in which frames carry their channels.
        mean, std: per-channel statistics (red, green, blue; for values in 0 to 1) that normalise a frame inside the artefact.
        precision: number format of the network's weights and activations.
        dynamic: which of "batch" and "size" may differ from frame to frame.
        role: what the network is to the user.
        method: the way it was trained; "elsewhere" for a network that this toolkit did not train.
        data: the data set it was trained on, as given.
        scores: what was measured on the validation images (fractions, 0 to 1).
        provenance: where it comes from (versions, git revision, hashes, command).
    """

    model: str
    classes: tuple[SegClass, ...]
    image_size_hw: tuple[int, int]
    channel_order: ChannelOrder = "bgr"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    precision: str = "fp32"
    dynamic: tuple[str, ...] = ()
    role: Literal["teacher", "student"] = "student"
    method: str = "none"
    data: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def class_names(self) -> list[str]:
        return [c.name for c in self.classes]

    def replace(self, **changes: Any) -> Metadata:
        """Return a copy with some attributes changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain dictionaries, lists, numbers and strings."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, value: Any, *, origin: Path | str) -> Metadata:
        """Read what `to_dict` gave.

        Raises:
            InputError: `value`, which came from the file `origin`, is of another form or a newer version.
        """
        try:
            refuse_newer(int(value["schema_version"]), SCHEMA_VERSION, origin=origin)
            classes = tuple(SegClass(str(c["name"]), _triple(c["color_rgb"], int)) for c in value["classes"])
            height, width = (int(v) for v in value["image_size_hw"])
            known = {f.name for f in dataclasses.fields(cls)}
            rest = {k: v for k, v in value.items() if k in known}
            rest |= {
                "classes": classes,
                "image_size_hw": (height, width),
                "mean": _triple(value["mean"], float),
                "std": _triple(value["std"], float),
                "dynamic": tuple(str(v) for v in value["dynamic"]),
                "scores": {str(k): float(v) for k, v in value["scores"].items()},
                "provenance": {str(k): str(v) for k, v in value["provenance"].items()},
            }
            for name in ("model", "precision", "role", "method", "data"):
                plain_text(rest.get(name, ""))
            if not classes or height < 1 or width < 1 or rest["channel_order"] not in ("bgr", "rgb"):
                raise ValueError("no classes, no size or an unknown channel order")
            return cls(**rest)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(
                f"{origin} carries no usable aicsd-deploy metadata ({error!r}), so its classes and input are unknown. "
                "Export it again with export/to_onnx.py, or train it with train/."
            ) from error

    @classmethod
    def from_onnx(cls, text: str | None, *, origin: Path | str) -> Metadata:
        """Read the JSON form of `to_dict`, which stands under `ONNX_KEY` in an ONNX file; see `from_dict`.

        Text is None where that is missing, or the input and output are not ours.
        """
        if text is None:
            raise InputError(
                f"{origin} was not exported by this toolkit: it has no aicsd-deploy metadata, or not one uint8 input and one output. "
                "Export the checkpoint with export/to_onnx.py."
            )
        try:
            value = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"The metadata in {origin} is damaged ({error}). Export the file again.") from error
        return cls.from_dict(value, origin=origin)


def refuse_newer(version: int, newest: int, *, origin: Path | str) -> None:
    """Raise InputError where the form of a file has a version above the newest one that this installation knows."""
    if version > newest:
        raise InputError(
            f"{origin} was written by a newer aicsd-deploy (version {version}, this one reads up to {newest}). Update this "
            "installation."
        )


def onnx_says(path: Path, key: str, value: str) -> bool:
    """Return whether an ONNX file's metadata give `key` this `value`.

    Their JSON stands in the file as it is, and so can be asked before there is a runtime or a package to read it.
    """
    return f'"{key}": "{value}"'.encode() in path.read_bytes()


def is_trusted(name: str) -> bool:
    """Return whether the user has allowed the code of this name, which a file names or carries, to run."""
    return name in (part.strip() for part in os.environ.get(TRUST_VARIABLE, "").split(","))


def plain_text(text: Any) -> None:
    """Raise ValueError unless this is text that does nothing to a terminal that it is printed on."""
    if not isinstance(text, str) or any(unicodedata.category(character) == "Cc" for character in text):
        raise ValueError(f"{text!r} is no text, or has control characters")


def _triple(values: Any, kind: type) -> Any:
    first, second, third = (kind(v) for v in values)
    return (first, second, third)


def provenance() -> dict[str, str]:
    """Return when, with what and by which command an artefact is being made."""
    found = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "aicsd_deploy": __version__,
        "python": platform.python_version(),
        "command": command_line(),
    }
    revision = git_revision()
    return found | ({"git": revision} if revision else {})


def command_line() -> str:
    """Return the command that runs, as one would write it in its script's folder."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


def git_revision() -> str | None:
    """Return the revision of the checkout this package runs from, `+` behind it for uncommitted changes; None elsewhere."""
    folder = Path(__file__).parent
    try:
        revision = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    tracked = subprocess.run(
        ["git", "ls-files", "--error-unmatch", __file__], cwd=folder, capture_output=True, check=False
    )
    return revision.stdout.strip() if tracked.returncode == 0 else None
