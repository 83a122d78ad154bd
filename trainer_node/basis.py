"""The directions a delta is made of, held by the trainer, per parameter group.

G groups, K directions, m sampled weights per group.

    momentum    the step the optimizer would take from momentum alone (Nesterov look-ahead)
    drift       displacement of the averaged weights over the window  (line-fit nowcasting)
    slow_drift  the same with memory over windows                     (AdEMAMix, outer momentum of SNOO)
    pull_back   averaged weights minus weights                        (weight averaging)

Momentum and pull-back are made when needed; the rest lives in averages.py. What "happened" is
measured on a fixed random sample of each group (`basis.sample_size`): keeping the former basis
in full would cost another K x weights. For a per-weight forecaster it also holds the past of all
weights (weight_history.py). Where parameters are cut among ranks (split.py), it holds this rank's part and
gives numbers of the whole. Never writes a weight: delta.py does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from common.errors import SettingsError
from common.messages import DIRECTIONS, DecisionPoint
from common.settings import BasisSettings
from trainer_node.averages import Averages, make_averages
from trainer_node.gram import GroupGram, least_squares
from trainer_node.groups import ParameterGroup
from trainer_node.optim.directions import momentum_directions
from trainer_node.snapshot import MemoryStore, TensorStore
from trainer_node.split import WHOLE, Split, local_of
from trainer_node.weight_forecast import WeightForecaster
from trainer_node.weight_history import WeightHistory
from trainer_node.weight_sample import WeightSample

K = len(DIRECTIONS)
MAX_SAMPLE_BYTES = 200 * 1024  # of a message's 256 KiB (common/codec.py); the rest of a point takes a few


class Basis:
    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        optimizers: Sequence[torch.optim.Optimizer],
        settings: BasisSettings,
        *,
        seed: int,
        park: TensorStore | None = None,
        make_history_store: Callable[[], TensorStore] = MemoryStore,
        split: Split = WHOLE,
    ) -> None:
        """`park` and `make_history_store` give stores of the basis' own; else process memory is used.

        With a split, all ranks make theirs together.
        """
        self.num_groups = len(groups)
        self.split = split
        self._settings, self._park = settings, park
        self._optimizers = list(optimizers)
        # `owners` are what the model has, `parameters` what this rank holds of each: the same, or its shard.
        self.owners: list[nn.Parameter] = [p for group in groups for p in group.parameters]
        self.parameters: list[Tensor] = [local_of(p) for p in self.owners]
        self._index = {p: index for index, p in enumerate(self.owners)}
        self.group_of = [g for g, group in enumerate(groups) for _ in group.parameters]
        self._form = (settings.dtype, False)  # type, and whether the averages are on the host
        self.averages = self._make_averages(former=None)
        starts = split.starts_of(self.owners)
        self._sample = WeightSample(groups, settings.sample_size, seed=seed, starts=starts)
        device = self.parameters[0].device
        self._former_GKm = torch.zeros(self.num_groups, K, settings.sample_size, device=device)
        self._has_former = torch.zeros((), dtype=torch.int64)
        self.has_compiled_pass = False  # delta.compile_pass
        self.history: WeightHistory | None = None
        if settings.history_snapshots > 0:
            _check_sample_fits(settings.history_sample, len(groups))
            self.history = WeightHistory(
                self.parameters,
                WeightSample(groups, settings.history_sample, seed=seed, starts=starts),
                num_snapshots=settings.history_snapshots,
                sample_size=settings.history_sample,
                dtype=settings.dtype,
                make_store=make_history_store,
                sum_=split.shards.sum_,
            )

    def _make_averages(self, former: Averages | None) -> Averages:
        settings, (dtype, on_host) = self._settings, self._form
        return make_averages(
            self.parameters,
            average_steps=settings.average_steps,
            average_share=settings.average_share,
            every_steps=settings.average_every_steps,
            slow_momentum=settings.slow_momentum,
            dtype=dtype,
            park=self._park,
            on_host=on_host,
            former=former,
        )

    @torch.no_grad()
    def put_into(self, dtype: str, on_host: bool) -> None:
        """Averages and history in another type ("fp32", "bf16") or place, between two steps.

        What they hold is kept as exactly as the type allows; on the host averages are exact. Weights are not
        touched, but a later jump is no longer that of an undisturbed run, bit for bit.
        """
        if self._form == (dtype, on_host):
            return
        self._form = (dtype, on_host)
        self.averages = self._make_averages(former=self.averages)
        if self.history is not None:
            self.history.put_into(dtype)

    def directions(self, *, with_momentum: bool = True) -> Iterator[tuple[int, list[Tensor]]]:
        """(parameter index, its K directions), one parameter at a time to bound memory."""
        for index, momentum in self.momenta(with_momentum=with_momentum):
            yield index, [momentum, *self.window_directions(index)]

    def window_directions(self, index: int) -> list[Tensor]:
        """All but the first of parameter `index`."""
        averages = self.averages
        return [averages.drift(index), averages.slow_drift(index), averages.pull_back(index)]

    def momenta(self, *, with_momentum: bool = True) -> Iterator[tuple[int, Tensor]]:
        """(parameter index, its first direction); without momentum a zero that costs nothing."""
        if with_momentum:
            momenta: Iterator[tuple[Tensor, Tensor]] = momentum_directions(self._optimizers)
        else:
            zeros = (p.new_zeros(()).expand_as(p) for p in self.parameters)
            momenta = zip(self.owners, zeros, strict=True)
        for parameter, momentum in momenta:
            index = self._index.get(parameter)
            if index is not None:
                yield index, local_of(momentum)

    @torch.no_grad()
    def close_window(self, *, window: int, fingerprint: str) -> DecisionPoint:
        """End the window, measure what happened in it and describe the directions from here.

        Moves one small tensor to the host: a decision point synchronises, an ordinary step does not.
        """
        averages = self.averages
        averages.end_window()
        sample_GKm = torch.zeros_like(self._former_GKm)
        products = GroupGram(self.num_groups, K + 1, sample_GKm.device)
        for index, directions in self.directions():
            flats = [d.reshape(-1).float() for d in directions]
            products.add(self.group_of[index], [*flats, self.parameters[index].detach().reshape(-1).float()])
            self._sample.gather(sample_GKm, index, flats)
        sum_ = self.split.shards.sum_
        products_GLL = sum_(products.result()).double().cpu()  # L = K + 1: the weights are the last row
        sum_(sample_GKm)
        gram_GKK = products_GLL[:, :K, :K]
        drift = DIRECTIONS.index("drift")
        happened_GK, unexplained_G = self._project(sample_GKm[:, drift])
        self._former_GKm.copy_(sample_GKm)
        self._has_former.fill_(1)
        if self.history is not None:
            self.history.take(averages.drift, self.average)
        return DecisionPoint(
            window=window,
            fingerprint=fingerprint,
            gram=tuple(gram_GKK.reshape(-1).tolist()),
            parameter_norms=tuple(products_GLL[:, K, K].sqrt().tolist()),
            displacement_norms=tuple(gram_GKK[:, drift, drift].clamp(min=0).sqrt().tolist()),
            happened=tuple(happened_GK.reshape(-1).tolist()),
            unexplained_share=tuple(unexplained_G.tolist()),
            weights=self.history.path_bytes() if self.history is not None else b"",
        )

    def _project(self, drift_Gm: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Least squares of this window's drift over the former basis, on the sample: (G, K), (G,)."""
        if not int(self._has_former):
            return np.zeros((self.num_groups, K)), np.ones(self.num_groups)
        return least_squares(self._former_GKm, drift_Gm)

    def average(self, index: int) -> Tensor:
        """The averaged weights of parameter `index`."""
        return self.parameters[index].detach() + self.averages.pull_back(index)

    @torch.no_grad()
    def forecast_displacements(self, forecaster: WeightForecaster) -> Iterator[tuple[int, Tensor]]:
        """(parameter index, its forecast displacement and pull-back), one at a time to bound memory.

        Raises ValueError while there are fewer snapshots than the forecaster needs.
        """
        if self.history is None or not self.history.is_full:
            raise ValueError("too few snapshots of the weights for a forecaster")
        forecaster = forecaster.to(self._former_GKm.device)
        pull_backs = forecaster.pull_back_G.tolist()
        for index, group in enumerate(self.group_of):
            delta = forecaster.displacement(group, self.average(index), self.history.differences(index))
            yield index, delta.add_(self.averages.pull_back(index), alpha=pull_backs[group])

    def gradient(self, index: int) -> Tensor | None:
        """What this rank holds of it; None where there is none."""
        gradient = self.owners[index].grad
        return None if gradient is None else local_of(gradient)

    def drop_gradients(self) -> None:
        for owner in self.owners:
            owner.grad = None

    def fingerprint(self) -> str:
        """Of all weights, wherever they are. Raises ReplicasDiffer."""
        return self.split.fingerprint(self.parameters)

    def sampled(self, tensors: Sequence[Tensor]) -> Tensor:
        """(G, m) sampled values of one tensor per parameter, this rank's part of each."""
        out_G1m = torch.zeros_like(self._former_GKm[:, :1])
        for index, tensor in enumerate(tensors):
            self._sample.gather(out_G1m, index, [tensor.detach().reshape(-1).float()])
        return self.split.shards.sum_(out_G1m)[:, 0]

    def sample_into(self, out_Gm: Tensor, index: int, tensor: Tensor) -> None:
        """This rank's part: the sample is whole when `out` was summed over the shards."""
        self._sample.gather(out_Gm.unsqueeze(1), index, [tensor.reshape(-1).float()])

    def sample_place(self, out_Gm: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Flat positions (n,), ascending, of the sampled weights, and the part (n,) of out that is theirs."""
        group, first, positions = self._sample.place_of(index)
        return positions, out_Gm[group, first : first + len(positions)]

    def empty_sample(self) -> Tensor:
        return torch.zeros_like(self._former_GKm[:, 0])

    def cosine(self, left_Gm: Tensor, right_Gm: Tensor) -> float:
        """Cosine over all weights, estimated from the sample; NaN if undefined."""
        scale_G1 = self._sample.inflation_G.to(left_Gm.device)[:, None]
        dot = (left_Gm * right_Gm * scale_G1).sum().item()
        norms = (left_Gm.square() * scale_G1).sum().item() * (right_Gm.square() * scale_G1).sum().item()
        return dot / norms**0.5 if norms > 0 else float("nan")

    def tensors(self) -> dict[str, Tensor]:
        past = self.history.tensors() if self.history is not None else {}
        mine = {"former": self._former_GKm, "has_former": self._has_former}
        return {**self.averages.tensors(), **past, **mine}

    @torch.no_grad()
    def load(self, saved: Mapping[str, Tensor]) -> None:
        """The reverse of `tensors`."""
        self.averages.load(saved)
        self._former_GKm.copy_(saved["former"])
        self._has_former.copy_(saved["has_former"])
        if self.history is not None:
            self.history.load(saved)

    def bytes_held(self) -> int:
        """Device memory on a GPU, process memory on CPU; what is parked elsewhere does not count."""
        samples = (self._former_GKm, self._has_former)
        past = self.history.bytes_held() if self.history is not None else 0
        return self.averages.bytes_held() + past + sum(t.numel() * t.element_size() for t in samples)

    def close(self) -> None:
        """Give parked memory and files back; the basis is at its end."""
        if self._park is not None:
            self._park.close()
        if self.history is not None:
            self.history.close()


def _check_sample_fits(sample_size: int, num_groups: int) -> None:
    """DecisionPoint.weights travels inside a message. Raises SettingsError."""
    limit = MAX_SAMPLE_BYTES // (4 * num_groups)
    if sample_size > limit:
        raise SettingsError(
            f"basis.history_sample = {sample_size} does not fit into a message with {num_groups} groups;"
            f" the largest is {limit}"
        )
