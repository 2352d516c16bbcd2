"""The instructions a rank executes; they print as text and parse back.

One instruction is one word: the stage, the kind's letters, the microbatch, then what it moves.

    2F0            forward of stage 2, microbatch 0
    2B0  2I0  2W0  backward; its input half; its weight half
    2RF0[x<1]      receive activation ``x`` for stage 2, microbatch 0, from stage 1
    2SF0[x>3]      send activation ``x`` of stage 2, microbatch 0, to stage 3
    2RB0[x<3]      receive the gradient of ``x`` from stage 3
    2SB0[x>1]      send the gradient of ``x`` to stage 1
    2DEL0[saved]   drop what stage 2 holds for microbatch 0 under that name
    GLOBALS NORM OPTIMIZER     once a step, for all stages of the rank
    2SYNC          wait for stage 2's gradient buckets

Transfers name the *peer stage*; which rank that is follows from the plan, since replica r of one
stage talks to replica r of the other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from raypar.errors import ScheduleError


class Kind(StrEnum):
    """What an instruction does; the value is its letters in text."""

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"
    RECV_FORWARD = "RF"
    SEND_FORWARD = "SF"
    RECV_BACKWARD = "RB"
    SEND_BACKWARD = "SB"
    FREE = "DEL"
    GRAD_SYNC = "SYNC"
    GLOBALS = "GLOBALS"
    NORM = "NORM"
    OPTIMIZER = "OPTIMIZER"

    # Lists are walked by the hundred thousand; an enum's own hash is a Python function.
    __hash__ = str.__hash__


COMPUTE = frozenset({Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT})
RECV = frozenset({Kind.RECV_FORWARD, Kind.RECV_BACKWARD})
SEND = frozenset({Kind.SEND_FORWARD, Kind.SEND_BACKWARD})

_WORD = re.compile(r"^(?:(\d+)([A-Z]+?)(\d+)?|([A-Z]+))(?:\[([^\[\]<>]+?)(?:([<>])(\d+))?\])?$")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One thing a rank does.

    Attributes:
        kind: What to do.
        stage: The stage it is done for; None for the once-a-step kinds.
        microbatch: The microbatch; None for GRAD_SYNC and the once-a-step kinds.
        value: The edge that moves (transfers), or what is dropped (FREE).
        peer: The other *stage* of a transfer.
    """

    kind: Kind
    stage: int | None = None
    microbatch: int | None = None
    value: str | None = None
    peer: int | None = None

    def __str__(self) -> str:
        head = "" if self.stage is None else str(self.stage)
        text = f"{head}{self.kind.value}{'' if self.microbatch is None else self.microbatch}"
        if self.value is None:
            return text
        if self.peer is None:
            return f"{text}[{self.value}]"
        return f"{text}[{self.value}{'<' if self.kind in RECV else '>'}{self.peer}]"

    @property
    def message(self) -> tuple[str, str, int, int, int] | None:
        """What identifies the message of a transfer, equal for its SEND and its RECV.

        Returns:
            ``("F" or "B", value, microbatch, sending stage, receiving stage)``, unique within a
            step; None for what is no complete transfer.
        """
        stage, mb, value, peer = self.stage, self.microbatch, self.value, self.peer
        if stage is None or mb is None or value is None or peer is None:
            return None
        ends = (peer, stage) if self.kind in RECV else (stage, peer)
        return (self.kind[1], value, mb, *ends)

    @classmethod
    def parse(cls, text: str) -> Instruction:
        """Reads what `str()` wrote.

        Raises:
            ScheduleError: `text` is not an instruction.
        """
        match = _WORD.match(text.strip())
        try:
            if match is None:
                raise ValueError
            stage, letters, microbatch, alone, value, arrow, peer = match.groups()
            kind = Kind(letters or alone)
            found = cls(
                kind,
                None if stage is None else int(stage),
                None if microbatch is None else int(microbatch),
                value,
                None if peer is None else int(peer),
            )
            if str(found) != text.strip() or (arrow and kind not in RECV | SEND):
                raise ValueError
        except ValueError:
            raise ScheduleError(
                f"{text!r} is not an instruction; examples: 2F0, 2RF0[x<1], 2SB0[x>1], 2SYNC, "
                "OPTIMIZER"
            ) from None
        return found
