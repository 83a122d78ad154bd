"""The learner of phi, the per-weight forecaster: online while a run goes on, offline from earlier runs.

Target: the displacement of the averaged weights 1, 2, 4, 8 windows ahead and to the last window known, so
a forecaster exported with pull_back = 1 lands the weights on the forecast average. Learns by Huber loss
on displacements in units of each weight's own scale, weighted by its square: shares of displacement count.
`explained_share` is prequential: each forecast is made, and kept, before its future is known.
Clocked by calls, seeded, no global state; `to_bytes` and `load` are exact. The network: phi_net.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from common.errors import SENSELESS, CheckpointError
from predictor_node.phi_net import Ahead, PhiNet, gain_of, group_scale_of, scale_of
from predictor_node.phi_runs import HORIZON_WINDOWS, SampledRun, WindowSample

HUBER_DELTA = 5.0
ONLINE_RATE = 3e-3
FIT_RATE = 5e-3
PAIRS = 4  # bases an update looks at
COLUMNS = 64  # of the sampled weights of each group in an update
SCORED_COLUMNS = 128
SCORE_DECAY = 0.9  # per scored window: about the last ten count
MAX_WINDOWS = 64  # held for learning online


@dataclass(frozen=True, kw_only=True)
class PhiShape:
    """What has to be equal for a state to be taken over."""

    group_sizes: tuple[int, ...]  # weights per group
    num_snapshots: int = 5  # c = J + 1
    hidden_units: int = 32


class PhiLearner:
    def __init__(
        self,
        shape: PhiShape,
        *,
        total_steps: int,
        mean_rate: Callable[[int, int], float],
        seed: int,
        updates_per_window: int = 4,
    ) -> None:
        """`mean_rate(steps_done, horizon_steps)` is the scheduled rate factor's mean over the horizon."""
        self.shape = shape
        self._num_groups, self._num_differences = len(shape.group_sizes), shape.num_snapshots - 1
        self._mean_rate, self._seed, self._updates_per_window = mean_rate, seed, updates_per_window
        self._net = PhiNet(
            num_groups=self._num_groups,
            num_differences=self._num_differences,
            hidden_units=shape.hidden_units,
            seed=seed,
        )
        self._optimizer = torch.optim.Adam(self._net.parameters(), lr=ONLINE_RATE, foreach=False)
        self._updates = 0
        self._run = SampledRun(total_steps, MAX_WINDOWS)
        self._forecasts: dict[tuple[int, int], Tensor] = {}  # (end window, horizon) -> (G, n) displacement
        # By horizon and group: decayed sums of residual squares and of displacement squares.
        self._scores_HG2 = torch.zeros(len(HORIZON_WINDOWS), self._num_groups, 2, dtype=torch.float64)

    # ---- online ------------------------------------------------------------------------------

    def observe(self, sample: WindowSample) -> None:
        """One decision point: score the forecasts for it, learn from it, forecast from it."""
        if sample.weights_GS.shape[0] != self._num_groups:
            return
        if not self._run.add(sample):
            self._forecasts.clear()
        self._score(sample)
        if self._num_windows > self._num_differences + 1:
            for _ in range(self._updates_per_window):
                self._update(self._run, ONLINE_RATE)
        if self.is_ready:
            self._forecast(sample)

    @property
    def is_ready(self) -> bool:
        """There are enough windows in a row for a forecast."""
        return self._num_windows > self._num_differences

    def export(self, horizon_steps: int, *, pull_back: float = 0.0) -> bytes:
        """The forecaster for the newest decision point; b"" while `is_ready` is false.

        `pull_back` is the share of the way to the averaged weights that the trainer adds; 1 = all of it.
        """
        if not self.is_ready:
            return b""
        past = self._run.past([self._num_windows - 1], self._num_differences)
        return self._net.export(past, self._ahead_of_newest(float(horizon_steps)), pull_back=pull_back)

    def explained_share(self, horizon_windows: int) -> float:
        """Share of the displacement that forecasts explained, over all weights; NaN before any came due.

        `horizon_windows` is one of HORIZON_WINDOWS. Below zero: no forecast would have been better.
        """
        sums_G2 = self._scores_HG2[HORIZON_WINDOWS.index(horizon_windows)]
        residual, total = sums_G2.sum(dim=0).tolist()
        return 1.0 - residual / total if total > 0 else float("nan")

    def explained_by_group(self, horizon_windows: int) -> tuple[float, ...]:
        """The same for each group (G)."""
        sums_G2 = self._scores_HG2[HORIZON_WINDOWS.index(horizon_windows)].tolist()
        return tuple(1.0 - r / total if total > 0 else float("nan") for r, total in sums_G2)

    # ---- offline -----------------------------------------------------------------------------

    def fit(self, runs: Sequence[Sequence[WindowSample]], *, total_steps: int, updates: int) -> None:
        """Learn from whole earlier runs, windows in order; the learning rate falls to zero."""
        usable = []
        for samples in runs:
            run = SampledRun(total_steps, limit=max(1, len(samples)))
            for sample in samples:
                run.add(sample)
            if len(run.samples) > self._num_differences + 1:
                usable.append(run)
        for done in range(updates if usable else 0):
            self._update(usable[done % len(usable)], FIT_RATE * (1.0 - done / updates))

    # ---- inside ------------------------------------------------------------------------------

    @property
    def _num_windows(self) -> int:
        return len(self._run.samples)

    def _update(self, run: SampledRun, rate: float) -> None:
        rng = np.random.default_rng([self._seed, 0xF1, self._updates])
        last = len(run.samples) - 1
        bases = rng.integers(self._num_differences, last, PAIRS).tolist()
        ends = [int(rng.choice(run.ends_of(base))) for base in bases]
        stride = max(1, run.samples[-1].weights_GS.shape[1] // COLUMNS)
        columns = slice(int(rng.integers(stride)), None, stride)
        past = run.past(bases, self._num_differences, columns)
        ahead = run.ahead(bases, ends, self._num_differences)
        scale_PGN = scale_of(past)
        target_PGN = run.moved(bases, ends, columns) / (scale_PGN * gain_of(past, ahead)[:, None, None])
        weight_PGN = (scale_PGN / group_scale_of(past)[..., None]).square() * past.valid_GN
        # Every weight of a group of four counts as much as one of four thousand: by share of displacement.
        weight_PGN = weight_PGN / weight_PGN.sum(dim=2, keepdim=True).clamp(min=1e-12)
        errors_PGN = F.huber_loss(self._net(past, ahead), target_PGN, delta=HUBER_DELTA, reduction="none")
        loss = (errors_PGN * weight_PGN).sum() / (PAIRS * self._num_groups)
        self._updates += 1
        if not bool(torch.isfinite(loss)):
            return  # a run that diverged teaches nothing
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()

    def _ahead_of_newest(self, horizon_steps: float) -> Ahead:
        newest = self._num_windows - 1
        windows = horizon_steps / self._run.mean_window_steps(newest, self._num_differences)
        rate = self._mean_rate(self._run.samples[newest].steps_done, round(horizon_steps))
        return Ahead(windows_P=torch.tensor([windows]), rate_P=torch.tensor([float(rate)]))

    def _forecast(self, sample: WindowSample) -> None:
        columns = self._scored_columns(sample)
        past = self._run.past([self._num_windows - 1], self._num_differences, columns)
        for windows in HORIZON_WINDOWS:
            # Windows to come are taken to be as long as the newest one.
            ahead = self._ahead_of_newest(float(windows * sample.window_steps))
            key = sample.window + windows, windows
            self._forecasts[key] = self._net.displacement(past, ahead)[0]

    def _score(self, sample: WindowSample) -> None:
        newest, columns = self._num_windows - 1, self._scored_columns(sample)
        for row, windows in enumerate(HORIZON_WINDOWS):
            forecast_GN = self._forecasts.pop((sample.window, windows), None)
            if forecast_GN is None or newest < windows:
                continue
            moved_GN = self._run.moved([newest - windows], [newest], columns)[0].double()
            valid_G = torch.from_numpy(np.isfinite(sample.weights_GS[:, columns]).sum(axis=1)).clamp(min=1)
            sizes_G = torch.tensor(self.shape.group_sizes, dtype=torch.float64) / valid_G
            residual_G = (moved_GN - forecast_GN.double()).square().sum(dim=1) * sizes_G
            sums_G2 = torch.stack([residual_G, moved_GN.square().sum(dim=1) * sizes_G], dim=1)
            if bool(torch.isfinite(sums_G2).all()):
                self._scores_HG2[row] = SCORE_DECAY * self._scores_HG2[row] + sums_G2

    def _scored_columns(self, sample: WindowSample) -> slice:
        return slice(None, None, max(1, sample.weights_GS.shape[1] // SCORED_COLUMNS))

    # ---- state -------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """Everything that later forecasts depend on (safetensors); equal learners give equal bytes."""
        tensors = {f"net.{name}": value for name, value in self._net.state_dict().items()}
        for name, parameter in self._net.named_parameters():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"adam.{key}.{name}"] = value
        for (window, windows), forecast_GN in self._forecasts.items():
            tensors[f"forecast.{window}.{windows}"] = forecast_GN
        for position, sample in enumerate(self._run.samples):
            tensors[f"sample.{position}"] = torch.from_numpy(sample.weights_GS)
        tensors["scores"] = self._scores_HG2
        facts = {
            "shape": [list(self.shape.group_sizes), self.shape.num_snapshots, self.shape.hidden_units],
            "updates": self._updates,
            "samples": [[s.window, s.window_steps, s.steps_done, s.rate] for s in self._run.samples],
        }
        tensors["facts"] = torch.tensor(list(json.dumps(facts, sort_keys=True).encode()), dtype=torch.uint8)
        return save({name: value.detach().contiguous() for name, value in tensors.items()})

    def load(self, content: bytes, *, same_run: bool = True) -> None:
        """The reverse of `to_bytes`; with `same_run` false only what was learned is taken over.

        Raises CheckpointError before anything is changed when the state is damaged or of another shape.
        """
        try:
            tensors = load(content)
            facts = json.loads(bytes(tensors["facts"].tolist()))
            mine = [list(self.shape.group_sizes), self.shape.num_snapshots, self.shape.hidden_units]
            if facts["shape"] != mine:
                raise CheckpointError(f"a forecaster state of shape {facts['shape']}; this run needs {mine}")
            net = {name: tensors[f"net.{name}"] for name in self._net.state_dict()}
            shapes_fit = all(net[name].shape == t.shape for name, t in self._net.state_dict().items())
            samples = [
                WindowSample(window=w, window_steps=n, steps_done=d, rate=r,
                             weights_GS=tensors[f"sample.{position}"].numpy())
                for position, (w, n, d, r) in enumerate(facts["samples"])
            ]  # fmt: skip
            updates, scores_HG2 = int(facts["updates"]), tensors["scores"]
        except (SafetensorError, *SENSELESS) as error:
            raise CheckpointError(f"damaged forecaster state: {error}") from None
        if not shapes_fit or scores_HG2.shape != self._scores_HG2.shape:
            raise CheckpointError("damaged forecaster state: wrong shapes")
        self._net.load_state_dict(net)
        self._load_optimizer(tensors)
        if same_run:
            self._updates, self._scores_HG2, self._run.samples = updates, scores_HG2, samples
            self._forecasts = {
                (int(name.split(".")[1]), int(name.split(".")[2])): tensor
                for name, tensor in sorted(tensors.items())
                if name.startswith("forecast.")
            }

    def _load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        self._optimizer.state.clear()
        for name, parameter in self._net.named_parameters():
            found = {key: tensors.get(f"adam.{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            if found["step"] is not None:
                self._optimizer.state[parameter] = found
