"""The past of every weight, for the per-weight forecaster: c snapshots of the averaged weights.

Held as c - 1 displacements, one a window: the newest snapshot is the present average, and the one
before is that minus the displacement. So a jump has nothing to shift (a displacement is of real
steps only: the jump and its probation lie between two windows), a restore has nothing to undo, and
bfloat16 is enough (it is not for weights: a window moves one by less than half a unit in the last place).
Averaged, not raw: the drift of the averages is at hand. On a small GPT (linear fit on two runs, tested on
a third) it explained 0.01, 0.02, 0.04 of the raw displacement 1, 4, 8 windows ahead, raw differences 0.05,
0.02, 0.03, and averages with their distance to the weights 0.12, 0.04, 0.05: close, so the cheap one.
Also owns the path: sampled averaged weights, as if no jump had ever moved them, for DecisionPoint.weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from common.errors import SettingsError
from trainer_node.snapshot import MemoryStore, TensorStore
from trainer_node.weight_sample import WeightSample


class WeightHistory:
    def __init__(
        self,
        parameters: Sequence[Tensor],
        sample: WeightSample,
        *,
        num_snapshots: int,
        sample_size: int,
        dtype: str,
        make_store: Callable[[], TensorStore] = MemoryStore,
        sum_: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        """`make_store` gives one store per displacement: process memory, pinned host memory or disk.

        `sum_` adds what the ranks gathered of the sample, each from its shards.
        """
        if num_snapshots < 2:
            raise SettingsError("basis.history_snapshots = 1 holds no displacement; set 0, or 2 and more")
        self._parameters = [p.detach() for p in parameters]
        self._dtype = _torch_type(dtype)
        self._slots = [make_store() for _ in range(num_snapshots - 1)]
        zeros = [torch.zeros_like(p, dtype=self._dtype) for p in self._parameters]
        for slot in self._slots:
            slot.save(zeros)
        self._taken = torch.zeros((), dtype=torch.int64)
        self._sample, self._sum = sample, sum_
        device = self._parameters[0].device
        self._path_GS = torch.zeros(len(sample.sizes_G), sample_size, device=device)

    @property
    def num_differences(self) -> int:
        return len(self._slots)

    @property
    def is_full(self) -> bool:
        return int(self._taken) >= len(self._slots)

    @torch.no_grad()
    def take(self, drift_of: Callable[[int], Tensor], average_of: Callable[[int], Tensor]) -> None:
        """The end of a window: its displacement takes the place of the oldest.

        For a moment all displacements of this window are in memory (`dtype`, one per weight).
        """
        first = int(self._taken) == 0
        drifts, step_G1S = [], torch.zeros_like(self._path_GS).unsqueeze(1)
        for index in range(len(self._parameters)):
            drift = drift_of(index)
            now = average_of(index) if first else drift
            self._sample.gather(step_G1S, index, [now.reshape(-1).float()])
            drifts.append(drift.to(self._dtype))
        self._slots[int(self._taken) % len(self._slots)].save(drifts)
        self._path_GS += self._sum(step_G1S)[:, 0]
        self._taken += 1

    def differences(self, index: int) -> list[Tensor]:
        """Displacements of parameter `index`, newest first, typed like it; zeros before there are."""
        newest = int(self._taken) - 1
        parameter = self._parameters[index]
        order = [(newest - age) % len(self._slots) for age in range(len(self._slots))]
        return [self._slots[slot].read(index).to(parameter) for slot in order]

    def path_bytes(self) -> bytes:
        """(G, S) float32 little-endian, row-major; NaN where a group has fewer than S weights."""
        path_GS = self._path_GS.cpu().numpy().astype("<f4")
        for row, size in zip(path_GS, self._sample.sizes_G, strict=True):
            row[size:] = np.nan
        return path_GS.tobytes()

    def put_into(self, dtype: str) -> None:
        """The displacements in another type ("fp32", "bf16"); the path stays."""
        self._dtype = _torch_type(dtype)
        for slot in self._slots:
            slot.save([slot.read(index).to(self._dtype) for index in range(len(self._parameters))])

    def places(self) -> list[tuple[str, int]]:
        """Bytes and where they are: "device" (the path), "host", "disk"."""
        path_bytes = self._path_GS.numel() * self._path_GS.element_size()
        return [("device", path_bytes), *((slot.place, slot.stored_bytes) for slot in self._slots)]

    def tensors(self) -> dict[str, Tensor]:
        """All state by name, for checkpoints."""
        held = {
            f"history.{slot}.{index}": store.read(index)
            for slot, store in enumerate(self._slots)
            for index in range(len(self._parameters))
        }
        return {**held, "history_path": self._path_GS, "history_taken": self._taken}

    @torch.no_grad()
    def load(self, saved: Mapping[str, Tensor]) -> None:
        """The reverse of `tensors`."""
        for slot, store in enumerate(self._slots):
            device = self._parameters[0].device
            store.save([saved[f"history.{slot}.{i}"].to(device) for i in range(len(self._parameters))])
        self._path_GS.copy_(saved["history_path"])
        self._taken.copy_(saved["history_taken"])

    def bytes_held(self) -> int:
        """Device memory on a GPU, process memory on CPU; what is parked elsewhere does not count."""
        on_cpu = not self._path_GS.is_cuda
        parked = sum(store.resident_bytes for store in self._slots) if on_cpu else 0
        return parked + self._path_GS.numel() * self._path_GS.element_size() + self._taken.element_size()

    def close(self) -> None:
        for store in self._slots:
            store.close()


def _torch_type(dtype: str) -> torch.dtype:
    return torch.bfloat16 if dtype == "bf16" else torch.float32
