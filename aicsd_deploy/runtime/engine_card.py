"""What stands beside a TensorRT engine in NAME.plan.json: what it is, what it takes, where it runs, and what was proved.

The .plan itself stays a plain engine, which trtexec and every other TensorRT program can load.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from aicsd_deploy.errors import InputError, MissingDependencyError
from aicsd_deploy.files import existing_file, sha256, write_json
from aicsd_deploy.metadata import Metadata, refuse_newer
from aicsd_deploy.runtime.driver import Gpu, gpu_index
from aicsd_deploy.runtime.tensorrt_module import NAMES, Flavor

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class EngineCard:
    """What is known about an engine.

    Attributes:
        plan_sha256, onnx_sha256: hashes of the engine and of the file it was built from.
        metadata: classes, colours and input contract; `precision` is what was asked for.
        flavor: the TensorRT that built it and can run it.
        version: that TensorRT's version.
        targets: cards it was built for with TensorRT-RTX; empty means every card from Ampere on.
        gpu: the card it was built on, None for TensorRT-RTX, which needs none.
        profiles: smallest, usual and largest (N, H, W) of each optimisation profile.
        precision_found: weighted layers and weights by type, as read back after building.
        float32_nodes: nodes left in float32, and why.
        options: what it was built with.
        gate: what was compared with what, and how well they agree.
        provenance: when, by which version and command it was built.
    """

    plan_sha256: str
    onnx_sha256: str
    metadata: Metadata
    flavor: Flavor
    version: str
    targets: tuple[str, ...]
    gpu: Gpu | None
    profiles: tuple[tuple[tuple[int, int, int], ...], ...]
    precision_found: dict[str, Any]
    float32_nodes: dict[str, str]
    options: dict[str, Any]
    gate: dict[str, Any]
    provenance: dict[str, str]

    def write(self, path: Path) -> None:
        """Write the card as JSON."""
        value = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        value["metadata"] = self.metadata.to_dict()
        value["gpu"] = dataclasses.asdict(self.gpu) if self.gpu else None
        write_json(path, {"schema_version": SCHEMA_VERSION, **value})

    def require_fit(self, plan: Path, *, gpu: Gpu, version: str) -> None:
        """Raise InputError unless the engine can run on a card in a version of its TensorRT."""
        reason = None
        compatible = self.options.get("version_compatible") and version.split(".")[0] == self.version.split(".")[0]
        if version != self.version and not compatible:
            reason = f"was built with {NAMES[self.flavor]} {self.version}, and {version} is installed here"
        elif self.targets and gpu.target not in self.targets:
            reason = f"was built for {', '.join(self.targets)}, and {gpu.name} is {gpu.target}"
        elif self.gpu and gpu.target != self.gpu.target and not self.options.get("hardware_compatible"):
            reason = f"was built on {self.gpu.name} ({self.gpu.target}), and this is {gpu.name} ({gpu.target})"
        if reason is not None:
            raise InputError(
                f"{plan} {reason}: TensorRT engines do not carry over. Build it again: {self.rebuild_command}"
            )

    @property
    def runs_on(self) -> str:
        """The cards that the engine fits, in words."""
        return ", ".join(self.targets) or (self.gpu.name if self.gpu else "every RTX card from Ampere on")

    @property
    def rebuild_command(self) -> str:
        """The command that builds the engine again on this machine."""
        return f"python export/to_trt.py STUDENT.onnx --{self.metadata.precision} --flavor {self.flavor}"


def card_path(plan: Path) -> Path:
    """Return where the card of an engine lies."""
    return plan.with_name(f"{plan.name}.json")


def holds(profile: Sequence[Sequence[int]], shape: Sequence[int]) -> bool:
    """Say whether a shape (N, H, W) lies between the smallest and the largest of a profile."""
    smallest, _, largest = profile
    return all(low <= extent <= high for low, extent, high in zip(smallest, shape, largest, strict=True))


def read_card(plan: Path) -> EngineCard:
    """Read the card of an engine and check that the engine is the one it speaks of, before anything loads it.

    Raises:
        InputError: the card is missing or damaged, of a newer version, or of another engine; or the engine is damaged.
    """
    path = card_path(plan)
    if not path.exists():
        raise InputError(
            f"{plan} has no {path.name} beside it, so its classes, its input and the card it fits are unknown. Copy that file "
            "along with the engine, or build it again with export/to_trt.py."
        )
    try:
        value = json.loads(existing_file(path, "The engine's card").read_text(encoding="utf-8"))
        refuse_newer(int(value["schema_version"]), SCHEMA_VERSION, origin=path)
        card = EngineCard(
            plan_sha256=str(value["plan_sha256"]),
            onnx_sha256=str(value["onnx_sha256"]),
            metadata=Metadata.from_dict(value["metadata"], origin=path),
            flavor=cast(Flavor, value["flavor"]),
            version=str(value["version"]),
            targets=tuple(str(target) for target in value["targets"]),
            gpu=_gpu(value["gpu"]),
            profiles=tuple(tuple(_shape(shape) for shape in profile) for profile in value["profiles"]),
            precision_found=dict(value["precision_found"]),
            float32_nodes=dict(value["float32_nodes"]),
            options=dict(value["options"]),
            gate=dict(value["gate"]),
            provenance=dict(value["provenance"]),
        )
        if card.flavor not in NAMES or any(len(profile) != 3 for profile in card.profiles):
            raise ValueError(f"flavor {card.flavor!r}, {len(card.profiles)} profiles")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged or was not written by this toolkit ({error!r}). Build the engine again with export/to_trt.py."
        ) from error
    if sha256(plan) != card.plan_sha256:
        raise InputError(
            f"{plan} is not the engine that {path.name} speaks of, or it was damaged or cut off on the way. Copy both files "
            f"again, or build it again: {card.rebuild_command}"
        )
    return card


def require_gpu_device(device: str, plan: Path) -> int:
    """Return the index of the GPU that a device name stands for; raise MissingDependencyError for the CPU."""
    if device == "cpu":
        raise MissingDependencyError(
            f"{plan} is a TensorRT engine, which runs on NVIDIA GPUs only, and --device cpu was asked for. Run the .onnx file it "
            "was built from."
        )
    return gpu_index(device)


def _gpu(value: Any) -> Gpu | None:
    if value is None:
        return None
    major, minor = (int(part) for part in value["cuda"])
    return Gpu(name=str(value["name"]), target=str(value["target"]), cuda=(major, minor))


def _shape(value: Any) -> tuple[int, int, int]:
    batch, height, width = (int(extent) for extent in value)
    return (batch, height, width)
