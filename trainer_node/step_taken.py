"""What the cycle is told of a step that somebody took, and asks of whoever takes them. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from trainer_node.step import StepTensors


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTaken:
    tensors: StepTensors
    rate_factor: float  # times the peak rate
    passes: float
    seconds: float  # for messages
    wall_seconds: float
    data_seconds: float  # for messages
    nominal_steps: float = 1.0  # its batch, as a multiple of the configured one


class StepAccount(Protocol):
    """What the cycle asks of whoever takes the steps."""

    @property
    def typical_wall_seconds(self) -> float:
        """Of the last steps; 0 before there is one."""
