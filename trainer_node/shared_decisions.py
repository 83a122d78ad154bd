"""The decisions, vetoes and orders of rank 0, on every rank at the same step. A DecisionSource.

Rank 0 asks the real source (the bus, a recording); what it says is broadcast as messages of our codec, so
that all ranks change phase or none. Between steps one small sum asks all ranks at once whether there is an
order or one of them was told to stop. Decides nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from common import codec
from common.messages import Order, PhaseDecision
from trainer_node.links import DecisionSource, NoDecisions
from trainer_node.ranks import Ranks


class SharedDecisions:
    def __init__(
        self, of_rank_0: DecisionSource | None, ranks: Ranks, *, is_told_to_stop: Callable[[], bool]
    ) -> None:
        """`of_rank_0` is None on the other ranks."""
        self._source = of_rank_0 or NoDecisions()
        self._ranks, self._is_told_to_stop = ranks, is_told_to_stop
        self.stop_agreed = False  # some rank was told to stop: known to all at the same step

    def wait_decision(self, *, step: int, attempt: int, seconds: float | None) -> PhaseDecision | None:
        found = self._source.wait_decision(step=step, attempt=attempt, seconds=seconds)
        content = self._ranks.broadcast(codec.encode(found) if found is not None else b"")
        if not content:
            return None
        decision = codec.decode(PhaseDecision.__name__, content)
        assert isinstance(decision, PhaseDecision)
        return decision

    def veto(self) -> str | None:
        reason: str | None = json.loads(self._ranks.broadcast(json.dumps(self._source.veto()).encode()))
        return reason

    def take_orders(self) -> list[Order]:
        mine = self._source.take_orders()
        if not self._ranks.any(bool(mine) or self._is_told_to_stop()):
            return []
        self.stop_agreed = self._ranks.any(self._is_told_to_stop())
        return self._of_rank_0(mine)

    def _of_rank_0(self, orders: list[Order]) -> list[Order]:
        count = int(self._ranks.broadcast(str(len(orders)).encode()))
        taken: list[Order] = []
        for number in range(count):
            mine = orders[number] if orders else None
            kind = self._ranks.broadcast(type(mine).__name__.encode())
            body = self._ranks.broadcast(codec.encode(mine) if mine is not None else b"")
            order = codec.decode(kind.decode(), body)
            assert isinstance(order, Order)
            taken.append(order)
        return taken
