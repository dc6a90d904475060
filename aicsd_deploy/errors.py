"""The errors a user can meet, and the exit code each one ends a command with."""

from __future__ import annotations

import re


class AicsdError(Exception):
    """Base of every error that is the user's to mend; its text says what is wrong, why it matters and what to do."""

    exit_code = 2


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, and the next where it ends in a colon, to be quoted in one of ours.

    It has no full stop at its end, whether or not the library writes one.
    """
    text = re.sub(r":\s*\n\s*", ": ", str(error).strip(), count=1) or type(error).__name__
    return re.sub(r"\x1b\[[0-9;]*m", "", text.splitlines()[0])[:300].rstrip(". ")  # some are in colour


def first_sentence(error: BaseException) -> str:
    """Return only the first sentence: what `torch.load` says next is how to load unsafely."""
    return first_line(error).partition(". ")[0]


class InputError(AicsdError):
    """A path, value, file or data set that cannot be used."""


class MissingDependencyError(AicsdError):
    """A package, driver or device that the asked-for work needs and that is not there."""


class VerificationError(AicsdError):
    """What was made does not behave like what it was made from, so it is not kept."""

    exit_code = 3


class Preempted(AicsdError):
    """The run was asked to stop and has saved its state; started again with --resume auto it goes on.

    75 is EX_TEMPFAIL of sysexits.h: "try again later", which a scheduler can be told to requeue.
    """

    exit_code = 75


class Interrupted(Preempted):
    """The same by Ctrl-C: whoever pressed it wants no other start."""

    exit_code = 130
