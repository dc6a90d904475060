"""Time stamps of damaged, joined and badly written files, made to go forward."""

from __future__ import annotations

from collections import deque
from fractions import Fraction

JUMP_BACK_S = 0.2
"""A step back of more than this is a new beginning, such as that of the second of two files joined into one; smaller ones are
pictures that are stamped out of order."""
JUMP_AHEAD_S = 10.0
"""In formats whose stamps may jump (AVFMT_TS_DISCONT), more than this is a jump too, as for ffmpeg's -dts_delta_threshold, but
only where picture and sound both jump; where one goes on, the other pauses."""


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
        self._newest_s: Fraction | None = None
        self._newest_of: dict[int, Fraction] = {}
        self._jumps_s: deque[Fraction] = deque(maxlen=16)

    def note(self, stamp_s: Fraction, *, stream: int) -> None:
        """Take notice of a packet, of the picture or of the sound, before `place` is asked about what is in it.

        Args:
            stamp_s: its stamp, in the order of decoding.
            stream: which stream of the file it belongs to.
        """
        before_s = self._newest_of.get(stream, stamp_s)
        if self._newest_s is None or stamp_s - before_s < -JUMP_BACK_S:
            self._newest_s = stamp_s
        elif (
            stamp_s - self._newest_s > JUMP_AHEAD_S
            and stamp_s - self._newest_of.get(stream, self._newest_s) > JUMP_AHEAD_S
        ):
            self._jumps_s.append(stamp_s)
        self._newest_s = max(self._newest_s, stamp_s)
        self._newest_of[stream] = stamp_s

    def place(self, stamp_s: Fraction | None) -> Fraction:
        """Return the time of the next one; None is one without a stamp."""
        follows_s = Fraction(0) if self._last_s is None else self._last_s + self._step_s
        time_s = follows_s if stamp_s is None else stamp_s + self._offset_s
        if self._last_s is not None:
            ahead_s = time_s - self._last_s
            if ahead_s < -JUMP_BACK_S or (ahead_s > JUMP_AHEAD_S and self._jumped(self._last_s, time_s)):
                self._offset_s += follows_s - time_s
                time_s = follows_s
        self._last_s = time_s
        return time_s

    def _jumped(self, from_s: Fraction, to_s: Fraction) -> bool:
        """Tell whether the file's stamps jumped between two times; the packet that told came shortly before or after."""
        begin_s, end_s = from_s - self._offset_s, to_s - self._offset_s + JUMP_AHEAD_S / 2
        return self._may_jump and any(begin_s < jump_s <= end_s for jump_s in self._jumps_s)
