"""The checkpoints of a run on several ranks: one sealed folder for all, kept by rank 0.

    whole copies (ddp)   rank 0 writes as a single process does, with the random state of every rank
    shards (fsdp)        every rank writes its own (sharded_checkpoint.py), then rank 0 seals

Stands where Checkpoints stands and says the same on every rank. All ranks call the same methods in the same
order; the run folder must be one that all machines see.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from common import codec, sealed_folder
from common.errors import EnvironmentFault
from common.messages import CheckpointWritten
from trainer_node.checkpoint import Checkpoints
from trainer_node.checkpoint_content import facts_of
from trainer_node.loop import Loop
from trainer_node.random_states import random_states
from trainer_node.ranks import Ranks
from trainer_node.sharded_checkpoint import shards_of, write_shards


class SharedCheckpoints:
    def __init__(self, of_rank_0: Checkpoints | None, root: Path, ranks: Ranks) -> None:
        """`of_rank_0` is None on the other ranks."""
        self._kept, self._root, self._ranks = of_rank_0, root, ranks
        self._best_name = ""

    @property
    def best_name(self) -> str:
        return self._kept.best_name if self._kept else self._best_name

    @best_name.setter
    def best_name(self, name: str) -> None:
        self._best_name = name
        if self._kept is not None:
            self._kept.best_name = name

    @property
    def last_failed(self) -> bool:
        """As rank 0 knows it."""
        return self._kept is not None and self._kept.last_failed

    @property
    def newest_bytes(self) -> int | None:
        return self._kept.newest_bytes if self._kept else None

    @property
    def free_bytes(self) -> int | None:
        return self._kept.free_bytes if self._kept else None

    def save(
        self,
        loop: Loop,
        housekeeping: Mapping[str, Any],
        *,
        emergency: bool,
        read_out: Mapping[str, Tensor] | None = None,
    ) -> CheckpointWritten | None:
        """See Checkpoints.save."""
        random = random_states(loop.task.split.ranks, loop.task.device)
        if loop.task.split.is_sharded:
            written = self._save_shards(loop, housekeeping, emergency, read_out, random)
        elif self._kept is not None:
            written = self._kept.save(
                loop, housekeeping, emergency=emergency, read_out=read_out, random=random
            )
        else:
            written = None
        content = self._ranks.broadcast(b"" if written is None else codec.encode(written))
        if not content:
            return None
        told = codec.decode(CheckpointWritten.__name__, content)
        assert isinstance(told, CheckpointWritten)
        return told

    def _save_shards(
        self,
        loop: Loop,
        housekeeping: Mapping[str, Any],
        emergency: bool,
        read_out: Mapping[str, Tensor] | None,
        random: Mapping[str, Tensor],
    ) -> CheckpointWritten | None:
        """The pause is that of writing: shards are captured straight in their files."""
        self.wait()
        name = sealed_folder.folder_name(loop.progress.step, loop.generation, emergency=emergency)
        facts, fault = facts_of(loop), ""
        try:
            if self._kept is not None:
                sealed_folder.begin(self._root, name)
        except EnvironmentFault as error:
            fault = str(error)
        if self._ranks.any(bool(fault)):
            return self._kept.failed(name, fault) if self._kept else None
        try:
            write_shards(sealed_folder.temporary_of(self._root, name), shards_of(loop, read_out))
        except EnvironmentFault as error:
            return self._kept.failed(name, str(error)) if self._kept else None
        if self._kept is None:
            return None
        return self._kept.seal(loop, housekeeping, name=name, facts=facts, emergency=emergency, random=random)

    def saved_until(self, step: int) -> list[Path]:
        names = [folder.name for folder in self._kept.saved_until(step)] if self._kept else []
        return [self._root / name for name in json.loads(self._ranks.broadcast(json.dumps(names).encode()))]

    def forget_newer(self, than: Path) -> None:
        if self._kept is not None:
            self._kept.forget_newer(than)
        self._ranks.any(False)  # nobody goes on before they are gone

    def wait(self) -> None:
        if self._kept is not None:
            self._kept.wait()

    def close(self) -> None:
        if self._kept is not None:
            self._kept.close()


AnyCheckpoints = Checkpoints | SharedCheckpoints
