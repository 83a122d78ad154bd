"""Laws of prediction with every optimizer: a jump that is not kept leaves no trace in any state tensor."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from common.messages import Observation, Outcome, PhaseDecision, Verdict
from common.sealed_folder import age_key
from common.settings import OptimizerSettings
from tests.trainer.small_job import SmallJob, bits, small_job
from tests.trainer.small_optim import EVERY_OPTIMIZER, by_name, run_steps
from tests.trainer.test_checkpoint import newest, run_with_checkpoints
from tests.trainer.test_loop import proposal
from tests.trainer.tiny import ScriptedLinks, tiny_loop, tiny_settings, weights_of
from trainer_node.basis import Basis
from trainer_node.checkpoint_content import load_optimizers, optimizer_state
from trainer_node.delta import apply_delta
from trainer_node.loop import Loop
from trainer_node.optim.build import build_optimizers
from trainer_node.optim.state import check_state
from trainer_node.read_out import weights_that_count
from trainer_node.snapshot import DiskStore, MemoryStore, Snapshot, optimizer_tensors

# One matrix of 64 x 64: as small as bitsandbytes keeps in 8 bits.
JOB = ("trainer.task=regression", "trainer.model.width=64", "trainer.model.layers=2", "trainer.steps=40")
OPTIONS = {
    "adamw": ("rate=0.01",),
    "adamw8bit": ("rate=0.01",),
    "lion": ("rate=0.001", "beta2=0.99"),
    "muon": ("rate=0.01",),
    "sgd": ("rate=0.1", "weight_decay=0.0005"),
}
STRICT = ("trainer.verify.tolerance=0.0", "trainer.verify.ruin_share=1.0")
LENIENT = ("trainer.verify.tolerance=100.0",)


def job_with(name: str, *more: str) -> tuple[str, ...]:
    own = [f"trainer.optimizer.{option}" for option in (f"name={name}", *OPTIONS[name])]
    return (*JOB, *own, *more)


def run(name: str, answer, *more: str, folder: Path | None = None) -> tuple[Loop, ScriptedLinks]:
    links = ScriptedLinks(answer=answer)
    loop = tiny_loop(links, tiny_settings(*job_with(name, *more)), folder=folder)
    loop.run()
    return loop, links


@cache
def plain_state(name: str) -> list[bytes]:
    """After a run in which nothing was proposed."""
    return state_of(run(name, lambda _: None)[0])


def state_of(loop: Loop) -> list[bytes]:
    return [bits(t) for t in (*weights_of(loop), *optimizer_tensors(loop.optimizers))]


@pytest.mark.parametrize("store", ["memory", "disk"])
@pytest.mark.parametrize("name", EVERY_OPTIMIZER)
def test_refused_jumps_leave_weights_and_every_state_tensor_as_without_them(
    name: str, store: str, tmp_path: Path
) -> None:
    """Refused at the end of probation, when the optimizer has stepped on from the bad weights."""

    def twice_bad(observation: Observation) -> PhaseDecision | None:
        is_late = observation.step > 15 and observation.attempt < 2
        return proposal(observation, drift=-3.0) if is_late else None

    more = (*STRICT, f"trainer.checkpoint.snapshot={store}")
    jumped, links = run(name, twice_bad, *more, folder=tmp_path)
    refused = [o for o in links.of(Outcome) if o.verdict is Verdict.REFUSED]
    assert [o.lost_steps for o in refused] == [6, 6]
    assert state_of(jumped) == plain_state(name)


@pytest.mark.parametrize("name", EVERY_OPTIMIZER)
def test_kept_jumps_go_on_from_moved_weights_and_the_average_can_be_read_out(name: str) -> None:
    def answer(observation: Observation) -> PhaseDecision:
        known = proposal(observation)
        return replace(known, coefficients=(1.0, 0.2, 0.0, 0.0) * known.num_groups)

    loop, links = run(name, answer, *LENIENT, "trainer.read_out=average", "trainer.basis.average_share=0.3")
    accepted = [o for o in links.of(Outcome) if o.verdict is Verdict.ACCEPTED]
    assert accepted
    assert all(o.delta_norm > 0 for o in accepted)
    trained = state_of(loop)
    assert trained != plain_state(name)
    losses = iter([2.0, 1.0])  # the guard batches prefer the average
    loop.guard_loss = lambda: next(losses)  # type: ignore[method-assign]
    with weights_that_count(loop) as is_average:
        assert is_average
        assert state_of(loop) != trained
    assert state_of(loop) == trained


@pytest.mark.parametrize("name", by_name("adamw8bit", "lion", "sgd"))
def test_k_steps_then_resume_equals_all_steps_bit_for_bit(name: str, tmp_path: Path) -> None:
    """With checkpoints in files and their two micro-batches a step; adamw and muon: test_checkpoint.py."""
    settings = job_with(name, "trainer.batch.accumulation=2")
    whole = run_with_checkpoints(tmp_path / "whole", *settings)
    run_with_checkpoints(tmp_path / "parts", *settings, stop_at=23)
    begin_from = newest(tmp_path / "parts")
    resumed = run_with_checkpoints(tmp_path / "parts", *settings, resume=begin_from)
    assert age_key(begin_from.name)[1] >= 10  # steps: there is a state to save
    assert state_of(whole) == state_of(resumed)


@pytest.mark.parametrize("name", by_name("adamw8bit"))
def test_a_table_that_all_8bit_moments_share_is_saved_with_each(name: str, tmp_path: Path) -> None:
    model = nn.ParameterList(nn.Parameter(torch.zeros(64, 64)) for _ in range(2))
    optimizers = build_optimizers(model, OptimizerSettings(name=name), torch.device("cpu"))
    run_steps(list(model), optimizers, 2)
    tensors, values = optimizer_state(optimizers)
    save_file(tensors, tmp_path / "optimizer.safetensors")  # which refuses tensors that share memory
    before = [bits(t) for t in optimizer_tensors(optimizers)]
    load_optimizers(optimizers, load_file(tmp_path / "optimizer.safetensors"), values)
    assert [bits(t) for t in optimizer_tensors(optimizers)] == before


SCALES = {
    "state1": (64, 64),
    "state2": (64, 64),
    "absmax1": (16,),
    "absmax2": (16,),
    "qmap1": (256,),
    "qmap2": (256,),
}
BAD_STATES = {
    "moment of one number": ({"exp_avg": torch.zeros(1)}, "exp_avg is \\[1\\]"),
    "codes too few": ({"state1": torch.zeros(64, dtype=torch.uint8)}, "state1 is"),
    "scales too few": ({"absmax1": torch.zeros(15)}, "absmax1 is"),
    "scales of half the bytes": ({"absmax2": torch.zeros(16, dtype=torch.float16)}, "not float32"),
    "table too short": ({"qmap1": torch.zeros(255)}, "qmap1 is"),
    "codes without scales": ({"absmax1": None}, "has no absmax1"),
    "codes without table": ({"qmap2": None}, "has no qmap2"),
}


def whole_8bit_state() -> dict[str, torch.Tensor]:
    kinds = {"state": torch.uint8}
    made = {key: torch.zeros(shape, dtype=kinds.get(key[:-1])) for key, shape in SCALES.items()}
    return {**made, "step": torch.tensor(3.0)}


@pytest.mark.parametrize("name", BAD_STATES)
def test_a_state_that_native_code_would_read_past_its_end_is_refused(name: str) -> None:
    parameter = torch.zeros(64, 64)
    check_state(parameter, whole_8bit_state())
    changes, words = BAD_STATES[name]
    state = {key: value for key, value in {**whole_8bit_state(), **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=words):
        check_state(parameter, state)


class Counting(torch.optim.SGD):
    """Keeps state where libraries do: wrapped and nested tensors, lists, keys of its own, groups."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            group["lr"] *= 0.5
            for parameter in group["params"]:
                state = self.state[parameter]
                if "pair" not in state:
                    state["pair"] = TwoTensor(torch.zeros(3), torch.ones(3))
                    state["nested"] = {"quantised": torch.zeros(2), "path": []}
                for tensor in (state["pair"].a, state["pair"].b, state["nested"]["quantised"]):
                    tensor.add_(parameter.grad.mean())
                state["nested"]["path"].append(parameter.detach().clone())
        self.state["all"] = {"count": self.state.get("all", {}).get("count", 0) + 1}


def everything(optimizer: Counting, weights: nn.Parameter) -> tuple[object, ...]:
    state = optimizer.state[weights]
    (group,) = optimizer.param_groups
    paths, count = [bits(t) for t in state["nested"]["path"]], optimizer.state["all"]["count"]
    return [bits(t) for t in optimizer_tensors([optimizer])], paths, count, group["step"]


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_a_snapshot_restores_wrapped_nested_and_group_state_and_leaves_the_schedule_its_rate(
    store: str, tmp_path: Path
) -> None:
    weights = nn.Parameter(torch.ones(4))
    optimizer = Counting([weights], lr=1.0, momentum=0.5)
    run_steps([weights], [optimizer], 2)
    before = everything(optimizer, weights)
    assert len(before[0]) == 6  # momentum, two of the pair, one nested, two of the path
    snapshot = Snapshot(
        MemoryStore() if store == "memory" else DiskStore(tmp_path), [weights], [optimizer], []
    )
    for _ in range(2):
        run_steps([weights], [optimizer], 2)
        assert everything(optimizer, weights) != before
        snapshot.restore()
        assert everything(optimizer, weights) == before
    assert optimizer.param_groups[0]["lr"] == 0.5**6


def test_a_job_with_an_unknown_optimizer_still_jumps_along_its_drift_and_back_to_its_average() -> None:
    known = small_job()
    optimizer = torch.optim.Adagrad(known.model.parameters(), lr=0.05)
    job = SmallJob(
        known.model,
        known.groups,
        [optimizer],
        Basis(known.groups, [optimizer], known.basis._settings, seed=0),
    )
    for _ in range(2):
        point = job.window()
    norms = torch.tensor(point.gram).view(len(job.groups), 4, 4).diagonal(dim1=1, dim2=2)
    assert not norms[:, 0].any()  # momentum
    assert bool((norms[:, 1:] > 0).all())
    assert apply_delta(job.basis, torch.tensor([[1.0, 0.5, 0.0, 0.5]] * len(job.groups))).norm > 0.0
