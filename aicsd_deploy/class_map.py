"""Classes of a teacher and of a student brought together: by name, by order, or by a file that says which is which."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aicsd_deploy.config import read_mapping
from aicsd_deploy.console import say
from aicsd_deploy.errors import InputError

UNKNOWN_LOGIT = -1e4
"""The logit of a class that the teacher does not know: never the highest, and finite in half precision."""


class RemappedClasses(nn.Module):
    """A network whose logits are brought to other classes.

    A class that is made of several gets log Σ exp of their logits, so that its probability is the sum of theirs.
    """

    def __init__(self, network: nn.Module, groups: Sequence[Sequence[int]]) -> None:
        """Wrap a network; `groups` gives, for each new class, the network's classes that it is made of, maybe none."""
        super().__init__()
        self.network = network
        self.groups = [list(group) for group in groups]

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.network(images_BCHW)
        unknown = torch.full_like(logits[:, 0], UNKNOWN_LOGIT)
        return torch.stack([torch.logsumexp(logits[:, g], dim=1) if g else unknown for g in self.groups], dim=1)


def match_classes(
    theirs: Sequence[str] | None,
    count: int,
    ours: Sequence[str],
    *,
    class_map: Path | None,
    teacher: str,
) -> list[list[int]] | None:
    """Return, for each of our classes, the teacher's classes that it is made of; None where the two are the same, in order.

    Args:
        theirs: the teacher's class names in order; None where it does not say them.
        count: how many classes it has.
        ours: the student's class names in order.
        class_map: a YAML file of lines `student class: teacher class` or `student class: [teacher class, teacher class]`; the
            teacher's classes by name or by index. A class of the student that it does not name is unknown to the teacher.
        teacher: the teacher's name, for messages.

    Raises:
        InputError: the classes differ and no file says how, or the file names a class that there is not, or one of the teacher's twice.
    """
    if class_map is not None:
        return _read(class_map, theirs, count, ours)
    if theirs is None:
        if count == len(ours):
            say(f"{teacher} does not name its {count} classes; they are taken to be in the order of the data set's.")
            return None
    else:
        plain, wanted = [_plain(name) for name in theirs], [_plain(name) for name in ours]
        if plain == wanted:
            return None
        if sorted(plain) == sorted(wanted) and len(set(plain)) == len(plain):
            say(f"{teacher} has the data set's classes in another order; they are matched by name.")
            return [[plain.index(name)] for name in wanted]
    named = "" if theirs is None else ": " + ", ".join(theirs)
    raise InputError(
        f"The teacher's classes are not those of the data, so its logits mean something else.\n"
        f"  teacher {teacher}: {count} classes{named}\n  data set: {len(ours)} classes: {', '.join(ours)}\n"
        "Say which is which with --class-map FILE (lines `student class: teacher class`), or give another teacher."
    )


def _read(path: Path, theirs: Sequence[str] | None, count: int, ours: Sequence[str]) -> list[list[int]]:
    content = read_mapping(path, "The class map", holds="lines `student class: teacher class`")
    wanted = [_plain(name) for name in ours]
    groups: list[list[int]] = [[] for _ in ours]
    for name, sources in content.items():
        if _plain(str(name)) not in wanted:
            raise InputError(f"{path}: {name!r} is no class of the data set. It has {', '.join(ours)}.")
        if sources is None:  # nothing behind the colon
            continue
        for source in sources if isinstance(sources, list) else [sources]:
            index = _index_of(source, theirs, count, path)
            if any(index in group for group in groups):
                raise InputError(
                    f"{path} names the teacher's class {source!r} twice: its probability would count twice, and what the teacher "
                    "is sure of would look undecided. Give it to one class of the data set only."
                )
            groups[wanted.index(_plain(str(name)))].append(index)
    if sum(bool(group) for group in groups) < 2:
        raise InputError(
            f"{path} gives the teacher fewer than two classes of the data set; there is nothing to learn. Name more of them."
        )
    unknown = [name for name, group in zip(ours, groups, strict=True) if not group]
    if unknown:
        say(
            f"The teacher does not know {', '.join(unknown)} and never gives them: pixels with these labels are left out of its terms "
            "(not of those of at, sp and ickd, which compare features)."
        )
    return groups


def _index_of(source: Any, theirs: Sequence[str] | None, count: int, path: Path) -> int:
    """Return the index of the teacher's class that a file calls `source`: its name or its index."""
    plain = [_plain(name) for name in theirs or []]
    index = source if type(source) is int else None  # not True, which `yes` is in YAML
    if index is None and _plain(str(source)) in plain:
        index = plain.index(_plain(str(source)))
    if index is None or not 0 <= index < count:
        known = f"It has {', '.join(theirs)}." if theirs else f"It names none; write an index from 0 to {count - 1}."
        raise InputError(f"{path}: {source!r} is no class of the teacher. {known}")
    return index


def _plain(name: str) -> str:
    return re.sub(r"[\s_/-]+", "", name).casefold()
