"""What has been given up for memory and not been taken back: by order, or where memory ran out.

Values only: memory_orders.py changes them, a checkpoint keeps them. How large a micro-batch is follows from
here: the batch of the settings is cut into pieces of that size, so the order of samples never changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from common.messages import MemoryAction
from common.settings import BasisSettings, BatchSettings


@dataclass
class MemoryState:
    halvings: int = 0  # of the micro-batch
    in_force: set[MemoryAction] = field(default_factory=set)  # neither CLEANUP nor HALVE_MICRO_BATCH
    proposals_from_window: int = 0  # FULL windows finished before a basis that was made anew is warm
    out_of_memory: int = 0  # times caught since the process began; not saved

    @property
    def is_recomputing(self) -> bool:
        return MemoryAction.RECOMPUTE in self.in_force

    @property
    def given_up(self) -> tuple[MemoryAction, ...]:
        """HALVE_MICRO_BATCH once for each halving."""
        return (*sorted(self.in_force), *[MemoryAction.HALVE_MICRO_BATCH] * self.halvings)

    def micro_batch(self, batch: BatchSettings) -> int:
        """Sequences or examples in one forward pass, at most; the last piece of a batch may be smaller."""
        return max(1, math.ceil(batch.sequences / (1 << self.halvings)))

    def accumulation(self, batch: BatchSettings) -> int:
        """Micro-batches of a step."""
        return batch.accumulation * math.ceil(batch.sequences / self.micro_batch(batch))

    def piece_size(self, batch: BatchSettings) -> int | None:
        """Into which batches are cut; None = they stay whole."""
        return self.micro_batch(batch) if self.halvings else None

    def basis_form(self, basis: BasisSettings) -> tuple[str, bool]:
        """Type of the directions ("fp32", "bf16"), and whether the averages are on the host."""
        is_bf16 = MemoryAction.BASIS_BF16 in self.in_force
        return ("bf16" if is_bf16 else basis.dtype, MemoryAction.BASIS_HOST in self.in_force)

    def to_json(self) -> dict[str, Any]:
        return {
            "halvings": self.halvings,
            "in_force": sorted(action.value for action in self.in_force),
            "proposals_from_window": self.proposals_from_window,
        }


def memory_state_from_json(values: Mapping[str, Any]) -> MemoryState:
    """Empty values (a checkpoint from before there were orders) give up nothing. Raises ValueError."""
    return MemoryState(
        halvings=int(values.get("halvings", 0)),
        in_force={MemoryAction(name) for name in values.get("in_force", ())},
        proposals_from_window=int(values.get("proposals_from_window", 0)),
    )
