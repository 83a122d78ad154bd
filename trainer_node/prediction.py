"""What prediction takes and gives back: the basis, the tools of a jump, and the observer's look at both.

Made anew, dropped and brought into another form while a run goes on, for memory's sake. Owns no phases and no
weights. Only between two steps without a jump on probation.
"""

from __future__ import annotations

from collections.abc import Callable

from common.messages import Phase
from common.settings import TrainerSettings
from trainer_node.basis import Basis
from trainer_node.memory_state import MemoryState
from trainer_node.observer import Observer
from trainer_node.phases import PhaseState
from trainer_node.snapshot import TensorStore
from trainer_node.trial import JumpTools

PredictionParts = Callable[[], tuple[Basis, TensorStore]]  # a basis, and a store for snapshots


class Prediction:
    def __init__(
        self,
        make_parts: PredictionParts | None,
        make_tools: Callable[[Basis, TensorStore], JumpTools],
        observer: Observer,
        settings: TrainerSettings,
        memory: MemoryState,
    ) -> None:
        """None as `make_parts` is plain training."""
        self.basis: Basis | None = None
        self.tools: JumpTools | None = None
        self._make_parts, self._make_tools = make_parts, make_tools
        self._observer, self._settings, self._memory = observer, settings, memory

    @property
    def is_possible(self) -> bool:
        return self._make_parts is not None

    def renew(self, phase: PhaseState) -> None:
        """A fresh basis in the place of any other; it proposes nothing before it has seen a whole window."""
        assert self._make_parts is not None, "plain training has no prediction"
        self.drop()
        basis, store = self._make_parts()
        basis.put_into(*self._memory.basis_form(self._settings.basis))
        self.basis, self.tools = basis, self._make_tools(basis, store)
        self._observer.watch(basis)
        begun = 1 if phase.phase is Phase.WARMUP else 2  # the present window is not a whole one
        self._memory.proposals_from_window = phase.windows + begun

    def drop(self) -> None:
        """No basis, no snapshots, no proposals, and what they held is free."""
        self.close_store()
        if self.basis is not None:
            self.basis.close()
        self.basis = self.tools = None
        self._observer.watch(None)

    def form(self, memory: MemoryState) -> None:
        """The basis, if there is one, in the form that follows from `memory`."""
        if self.basis is not None:
            self.basis.put_into(*memory.basis_form(self._settings.basis))
            self._observer.watch(self.basis)

    def close_store(self) -> None:
        if self.tools is not None:
            self.tools.store.close()
