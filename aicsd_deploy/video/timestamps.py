"""Time stamps of damaged, joined and badly written files, made to go forward."""

from __future__ import annotations

from fractions import Fraction

JUMP_BACK_S = 0.2
"""A step back of more than this is a new beginning, such as that of the second of two files joined into one; smaller ones are
pictures that are stamped out of order."""
JUMP_AHEAD_S = 10.0
"""In formats whose stamps may jump (AVFMT_TS_DISCONT), more than this is a jump too, as for ffmpeg's -dts_delta_threshold."""


class Timeline:
    """Seconds from the first picture or packet on, for stamps in their order; after a jump they go on where they were.

    Args:
        start_s: the stamp that is second 0.
        step_s: how much later something follows of which its stamp does not tell.
        may_jump: the format's stamps may jump.
    """

    def __init__(self, *, start_s: Fraction, step_s: Fraction, may_jump: bool) -> None:
        self._offset_s, self._step_s, self._may_jump = -start_s, step_s, may_jump
        self._last_s: Fraction | None = None

    def place(self, stamp_s: Fraction | None) -> Fraction:
        """Return the time of the next one; None is one without a stamp."""
        follows_s = Fraction(0) if self._last_s is None else self._last_s + self._step_s
        time_s = follows_s if stamp_s is None else stamp_s + self._offset_s
        if self._last_s is not None:
            ahead_s = time_s - self._last_s
            if ahead_s < -JUMP_BACK_S or (self._may_jump and ahead_s > JUMP_AHEAD_S):
                self._offset_s += follows_s - time_s
                time_s = follows_s
        self._last_s = time_s
        return time_s
