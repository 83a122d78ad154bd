"""In the place of the connection to the bus on every rank but the first: hears nothing, says nothing.

What there is to hear comes to it through rank 0 (shared_decisions.py); what it would say, rank 0 says too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from common.errors import Fenced
from common.messages import Message
from trainer_node.cycle import Cycle
from trainer_node.inbox import Inbox


class OtherRank:
    def __init__(self, *, step: int) -> None:
        self.step, self.generation, self.late = step, 0, 0
        self.fenced: Fenced | None = None
        self.inbox: Inbox | None = None

    def emit(self, message: Message) -> None:
        pass

    def alarm(self, text: str, *, kind: str = "trainer_fault", severity: str = "error") -> None:
        pass

    def begin(
        self, cycle: Cycle, *, resumed_from: str, listeners: Sequence[Callable[[Message], None]] = ()
    ) -> None:
        pass

    def repeat_start_if_lost(self) -> None:
        pass
