"""The directions a delta is made of, held by the trainer, per parameter group.

G groups, K directions, m sampled weights per group.

    momentum    the step the optimizer would take from momentum alone (Nesterov look-ahead)
    drift       displacement of the averaged weights over the window  (line-fit nowcasting)
    slow_drift  the same with memory over windows                     (AdEMAMix, outer momentum of SNOO)
    pull_back   averaged weights minus weights                        (weight averaging)

Momentum and pull-back are made when needed; the rest lives in averages.py. What "happened" is
measured on a fixed random sample of each group (`basis.sample_size`): keeping the former basis
in full would cost another K x weights. Never writes a weight: delta.py does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from common.messages import DIRECTIONS, DecisionPoint
from common.settings import BasisSettings
from trainer_node.averages import Averages, make_averages
from trainer_node.groups import ParameterGroup
from trainer_node.optim.build import momentum_directions
from trainer_node.snapshot import TensorStore

K = len(DIRECTIONS)


class Basis:
    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        optimizers: Sequence[torch.optim.Optimizer],
        settings: BasisSettings,
        *,
        seed: int,
        park: TensorStore | None = None,
    ) -> None:
        """`park` is a store of the basis' own; process memory if there is none."""
        self.num_groups = len(groups)
        self._optimizers = list(optimizers)
        self.parameters: list[nn.Parameter] = [p for group in groups for p in group.parameters]
        self._index = {p: index for index, p in enumerate(self.parameters)}
        self.group_of = [g for g, group in enumerate(groups) for _ in group.parameters]
        self.averages: Averages = make_averages(
            self.parameters,
            average_steps=settings.average_steps,
            slow_momentum=settings.slow_momentum,
            dtype=settings.dtype,
            park=park,
        )
        self._sample = WeightSample(groups, settings.sample_size, seed=seed)
        device = self.parameters[0].device
        self._former_GKm = torch.zeros(self.num_groups, K, settings.sample_size, device=device)
        self._has_former = torch.zeros((), dtype=torch.int64)

    def directions(self, *, with_momentum: bool = True) -> Iterator[tuple[int, list[Tensor]]]:
        """(parameter index, its K directions), one parameter at a time to bound memory.

        Without momentum the first direction is a zero that costs nothing.
        """
        if with_momentum:
            momenta: Iterator[tuple[Tensor, Tensor]] = momentum_directions(self._optimizers)
        else:
            momenta = ((p, p.new_zeros(()).expand_as(p)) for p in self.parameters)
        for parameter, momentum in momenta:
            index = self._index.get(parameter)
            if index is not None:
                averages = self.averages
                yield (
                    index,
                    [momentum, averages.drift(index), averages.slow_drift(index), averages.pull_back(index)],
                )

    @torch.no_grad()
    def close_window(self, *, window: int, fingerprint: str) -> DecisionPoint:
        """End the window, measure what happened in it and describe the directions from here.

        Moves one small tensor to the host: a decision point synchronises, an ordinary step does not.
        """
        self.averages.end_window()
        gram_GKK = torch.zeros(self.num_groups, K, K, device=self._former_GKm.device)
        sample_GKm = torch.zeros_like(self._former_GKm)
        squares_G = torch.zeros(self.num_groups, device=gram_GKK.device)
        for index, directions in self.directions():
            group = self.group_of[index]
            flat = [d.reshape(-1).float() for d in directions]
            for i in range(K):
                for j in range(i + 1):
                    gram_GKK[group, i, j] += torch.dot(flat[i], flat[j])
            squares_G[group] += self.parameters[index].detach().float().square().sum()
            self._sample.gather(sample_GKm, index, flat)
        gram_GKK = gram_GKK + gram_GKK.tril(-1).transpose(1, 2)
        drift = DIRECTIONS.index("drift")
        happened_GK, unexplained_G = self._project(sample_GKm[:, drift])
        self._former_GKm.copy_(sample_GKm)
        self._has_former.fill_(1)
        return DecisionPoint(
            window=window,
            fingerprint=fingerprint,
            gram=_floats(gram_GKK),
            parameter_norms=_floats(squares_G.sqrt()),
            displacement_norms=_floats(gram_GKK[:, drift, drift].clamp(min=0).sqrt()),
            happened=tuple(float(c) for c in happened_GK.reshape(-1)),
            unexplained_share=tuple(float(u) for u in unexplained_G),
        )

    def _project(self, drift_Gm: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Least squares of this window's drift over the former basis, on the sample: (G, K), (G,)."""
        coefficients_GK, unexplained_G = np.zeros((self.num_groups, K)), np.ones(self.num_groups)
        if not int(self._has_former):
            return coefficients_GK, unexplained_G
        former, target = self._former_GKm.double().cpu().numpy(), drift_Gm.double().cpu().numpy()
        for group in range(self.num_groups):
            norms_K = np.linalg.norm(former[group], axis=1)
            total = float(target[group] @ target[group])
            if total == 0.0 or not np.isfinite(total) or not np.isfinite(norms_K).all():
                continue
            scale_K = np.where(norms_K > 0, norms_K, 1.0)
            design_mK = (former[group] / scale_K[:, None]).T
            solution_K = np.linalg.lstsq(design_mK, target[group], rcond=1e-6)[0]
            residual_m = target[group] - design_mK @ solution_K
            coefficients_GK[group] = solution_K / scale_K
            unexplained_G[group] = min(1.0, float(residual_m @ residual_m) / total)
        return coefficients_GK, unexplained_G

    def sampled(self, tensors: Sequence[Tensor]) -> Tensor:
        """(G, m) sampled values of one tensor per parameter."""
        out_G1m = torch.zeros_like(self._former_GKm[:, :1])
        for index, tensor in enumerate(tensors):
            self._sample.gather(out_G1m, index, [tensor.detach().reshape(-1).float()])
        return out_G1m[:, 0]

    def sample_into(self, out_Gm: Tensor, index: int, tensor: Tensor) -> None:
        self._sample.gather(out_Gm.unsqueeze(1), index, [tensor.reshape(-1).float()])

    def empty_sample(self) -> Tensor:
        return torch.zeros_like(self._former_GKm[:, 0])

    def cosine(self, left_Gm: Tensor, right_Gm: Tensor) -> float:
        """Cosine over all weights, estimated from the sample; NaN if undefined."""
        scale_G1 = self._sample.inflation_G.to(left_Gm.device)[:, None]
        dot = (left_Gm * right_Gm * scale_G1).sum().item()
        norms = (left_Gm.square() * scale_G1).sum().item() * (right_Gm.square() * scale_G1).sum().item()
        return dot / norms**0.5 if norms > 0 else float("nan")

    def tensors(self) -> dict[str, Tensor]:
        return {**self.averages.tensors(), "former": self._former_GKm, "has_former": self._has_former}

    @torch.no_grad()
    def load(self, saved: Mapping[str, Tensor]) -> None:
        """The reverse of `tensors`."""
        self.averages.load(saved)
        self._former_GKm.copy_(saved["former"])
        self._has_former.copy_(saved["has_former"])

    def bytes_held(self) -> int:
        """Device memory on a GPU, process memory on CPU; what is parked elsewhere does not count."""
        samples = (self._former_GKm, self._has_former)
        return self.averages.bytes_held() + sum(t.numel() * t.element_size() for t in samples)


class WeightSample:
    """A fixed random choice of m weights in each group (all of them, padded, where there are fewer)."""

    def __init__(self, groups: Sequence[ParameterGroup], sample_size: int, *, seed: int) -> None:
        rng = np.random.default_rng([seed, 0xBA515])
        self._places: list[tuple[int, int, Tensor]] = []  # group, first column, flat positions
        inflation = []
        for group_index, group in enumerate(groups):
            sizes = [p.numel() for p in group.parameters]
            total = sum(sizes)
            if total > sample_size:
                chosen = np.sort(rng.choice(total, sample_size, replace=False))
            else:
                chosen = np.arange(total)
            inflation.append(total / len(chosen))
            starts = np.cumsum([0, *sizes])
            for start, end, parameter in zip(starts[:-1], starts[1:], group.parameters, strict=True):
                low, high = np.searchsorted(chosen, [start, end])
                positions = torch.from_numpy(chosen[low:high] - start).to(parameter.device)
                self._places.append((group_index, int(low), positions))
        self.inflation_G = torch.tensor(inflation, dtype=torch.float32)

    def gather(self, out_GKm: Tensor, index: int, flats: Sequence[Tensor]) -> None:
        """Write the sampled values of parameter `index` into out (G, K, m)."""
        group, first, positions = self._places[index]
        for direction, flat in enumerate(flats):
            out_GKm[group, direction, first : first + len(positions)] = flat[positions]


def _floats(tensor: Tensor) -> tuple[float, ...]:
    return tuple(tensor.double().reshape(-1).tolist())
