"""Every order does what it says, is answered, and is taken back."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch

from common.errors import EnvironmentFault
from common.messages import (
    MemoryAction,
    MemoryReport,
    Observation,
    OrderDone,
    Outcome,
    Verdict,
)
from common.settings import BatchSettings
from tests.trainer.memory_scene import Scene, gpt_settings, ordered
from tests.trainer.simulated_memory import within
from tests.trainer.test_loop import proposal
from tests.trainer.tiny import ScriptedLinks, same_bits, tiny_loop, tiny_settings, weights_of
from trainer_node import recompute
from trainer_node.memory_orders import carry_out, put_in_force
from trainer_node.memory_report import holders
from trainer_node.memory_state import MemoryState, memory_state_from_json
from trainer_node.snapshot import MemoryStore

A = MemoryAction
PLAIN = "predictor.enabled=false"
Uncounted = partial(Scene, is_counted=False)


def answers(scene: Scene) -> dict[str, OrderDone]:
    return {done.order_id: done for done in scene.links.of(OrderDone)}


def held(scene: Scene, name: str) -> int:
    return sum(h.num_bytes for h in holders(scene.loop) if h.name == name)


# ---- the whole ladder, down and up ---------------------------------------------------------------

# After which step. Decision points (14, 20, 26, 32, 38) are not calm.
DOWN = {10: A.CLEANUP, 12: A.BASIS_BF16, 16: A.PREDICTION_OFF, 18: A.HALVE_MICRO_BATCH, 22: A.RECOMPUTE}
UP = {24: A.RECOMPUTE, 28: A.HALVE_MICRO_BATCH, 30: A.PREDICTION_OFF, 34: A.BASIS_BF16}


@pytest.fixture(scope="module")
def ladder() -> Scene:
    torch.set_num_threads(1)
    at = {step: ordered(action) for step, action in DOWN.items()}
    at |= {step: ordered(action, undo=True) for step, action in UP.items()}
    return Scene(gpt_settings(), at=at).run()


def test_the_whole_ladder_goes_down_and_back_and_loses_no_step(ladder: Scene) -> None:
    scene, twin = ladder, Uncounted(gpt_settings()).run()
    assert all(done.done for done in scene.links.of(OrderDone)), answers(scene)
    assert len(answers(scene)) == len(DOWN) + len(UP)
    assert scene.loop.progress.step == scene.settings.trainer.steps
    assert scene.loop.ledger.lost_steps == scene.memory.raised == 0
    assert [o.step for o in scene.links.of(Observation)] == list(range(1, 41))
    np.testing.assert_allclose(scene.losses, twin.losses, rtol=1e-4)
    assert scene.loop.memory.in_force == set()
    assert scene.loop.memory.halvings == 0


def test_every_order_frees_what_it_says_and_its_undoing_takes_it_again(ladder: Scene) -> None:
    scene = ladder
    weights_bytes = sum(p.numel() * 4 for p in scene.task.model.parameters())
    used, peak = scene.used_bytes, scene.peak_bytes
    # Averages, their start and the slow drift, three times the weights, become 1.5 times, then nothing.
    assert used[12] - used[13] == pytest.approx(1.5 * weights_bytes, rel=0.05)
    assert used[16] - used[17] >= 1.5 * weights_bytes
    step_bytes = {step: peak[step] - used[step] for step in peak}
    assert step_bytes[19] < 0.75 * step_bytes[18]
    assert step_bytes[23] < 0.9 * step_bytes[22]
    assert step_bytes[25] == pytest.approx(step_bytes[22], rel=0.02)
    assert step_bytes[29] == pytest.approx(step_bytes[18], rel=0.02)
    assert used[37] == pytest.approx(used[11], rel=0.02)


def test_a_report_follows_every_order(ladder: Scene) -> None:
    reports = [r for r in ladder.links.of(MemoryReport) if r.occasion == "order"]
    sizes = [(r.micro_batch, r.accumulation) for r in reports]
    assert sizes == [(8, 1)] * 3 + [(4, 2)] * 3 + [(8, 1)] * 3
    has_averages = [any(h.name == "averages" for h in r.holders) for r in reports]
    assert has_averages == [True, True, False, False, False, False, False, True, True]


def test_orders_wait_until_no_jump_is_on_probation() -> None:
    links = ScriptedLinks(answer=lambda o: proposal(o, drift=0.1))
    settings = gpt_settings("trainer.verify.tolerance=100.0")
    scene = Uncounted(settings, links=links)
    seen: list[bool] = []

    def watch(message: object) -> None:
        links.emit(message)  # type: ignore[arg-type]
        if isinstance(message, Observation) and message.phase.value == "correct":
            scene.order(A.HALVE_MICRO_BATCH)
        if isinstance(message, OrderDone):
            seen.append(scene.loop.is_calm)

    scene.loop.emit = watch
    scene.housekeeping._emit = watch
    scene.run()
    assert seen
    assert all(seen)


# ---- micro-batches -------------------------------------------------------------------------------


def test_halving_leaves_the_samples_of_every_step_and_their_order_as_they_were() -> None:
    def inputs_of(scene: Scene) -> list[list[int]]:
        rows: list[list[int]] = []
        scene.task.model.register_forward_pre_hook(
            lambda model, args: rows.extend(args[0].tolist()) if model.training else None
        )
        scene.run()
        return rows

    halved = Uncounted(gpt_settings(PLAIN), at={3: ordered(A.HALVE_MICRO_BATCH, A.HALVE_MICRO_BATCH)})
    assert inputs_of(halved) == inputs_of(Uncounted(gpt_settings(PLAIN)))


@pytest.mark.parametrize("sequences", [1, 2, 5, 7, 8, 12])
def test_a_micro_batch_is_halved_down_to_one_and_never_to_nothing(sequences: int) -> None:
    settings = gpt_settings(PLAIN, f"trainer.batch.sequences={sequences}", "trainer.steps=5")
    scene = Uncounted(settings)
    while carry_out(scene.loop, A.HALVE_MICRO_BATCH, undo=False).done:
        assert scene.loop.memory.halvings < 10
    assert scene.loop.memory.micro_batch(settings.trainer.batch) == 1
    assert scene.loop.memory.accumulation(settings.trainer.batch) == sequences
    twin = Uncounted(settings)
    np.testing.assert_allclose(scene.run().losses, twin.run().losses, rtol=1e-4)
    for _ in range(scene.loop.memory.halvings):
        assert carry_out(scene.loop, A.HALVE_MICRO_BATCH, undo=True).done
    assert not carry_out(scene.loop, A.HALVE_MICRO_BATCH, undo=True).done
    assert scene.loop.memory.micro_batch(settings.trainer.batch) == sequences


def test_pieces_weigh_as_much_as_they_hold() -> None:
    """Five sequences in pieces of 3 and 2, with accumulation: the gradient is that of the whole."""
    settings = gpt_settings(PLAIN, "trainer.batch.sequences=5", "trainer.batch.accumulation=2")
    scene, twin = Uncounted(settings, at={1: ordered(A.HALVE_MICRO_BATCH)}), Uncounted(settings)
    np.testing.assert_allclose(scene.run().losses, twin.run().losses, rtol=1e-4)
    assert scene.loop.memory.accumulation(settings.trainer.batch) == 4


# ---- recomputing ---------------------------------------------------------------------------------


def test_recomputing_changes_no_bit_even_with_dropout() -> None:
    settings = gpt_settings(PLAIN, "trainer.model.dropout=0.2")
    scene, twin = Uncounted(settings, at={5: ordered(A.RECOMPUTE)}).run(), Uncounted(settings).run()
    assert answers(scene)["recompute"].done
    assert same_bits(weights_of(scene.loop), weights_of(twin.loop))


def test_recomputing_is_one_more_forward_pass_in_the_account() -> None:
    scene = Uncounted(gpt_settings(PLAIN), at={21: ordered(A.RECOMPUTE)}).run()
    assert scene.loop.ledger.passes["steps"] == 21 * 3 + 19 * 4


def test_a_model_without_blocks_cannot_recompute_and_says_so() -> None:
    loop = tiny_loop(ScriptedLinks(), tiny_settings(PLAIN))
    done = carry_out(loop, A.RECOMPUTE, undo=False)
    assert (done.done, done.detail) == (False, "DigitsCNN has no blocks")
    assert loop.memory.in_force == set()


def test_undoing_leaves_no_trace_of_recomputing_on_the_blocks() -> None:
    model = Uncounted(gpt_settings(PLAIN)).task.model
    before = [dict(block.__dict__) for block in model.blocks]
    recompute.set_recompute(model, True)
    assert all("forward" in block.__dict__ for block in model.blocks)
    recompute.set_recompute(model, True)
    recompute.set_recompute(model, False)
    assert [block.__dict__.keys() for block in model.blocks] == [b.keys() for b in before]


# ---- prediction off and on -----------------------------------------------------------------------


def with_jumps(**at: object) -> Scene:
    """Proposals at every point, all kept."""
    links = ScriptedLinks(answer=lambda o: proposal(o, drift=0.1))
    settings = gpt_settings("trainer.steps=80", "trainer.verify.tolerance=100.0")
    return Uncounted(settings, links=links, **at)  # type: ignore[arg-type]


def test_without_prediction_there_are_no_proposals_and_afterwards_a_window_warms_up_first() -> None:
    scene = with_jumps(at={9: ordered(A.PREDICTION_OFF), 42: ordered(A.PREDICTION_OFF, undo=True)})
    scene.run()
    points = [o.step for o in scene.links.of(Observation) if o.decision_point]
    # WARMUP ends at 8; windows of 6 steps end at 14, 20, ..., 44. The one that ends at 44 was seen in part.
    assert [p for p in points if p < 42] == []
    assert points[0] == 50
    accepted = [o.base_step for o in scene.links.of(Outcome) if o.verdict is Verdict.ACCEPTED]
    assert accepted[0] == 50


def test_prediction_off_frees_snapshots_too_and_a_renewed_one_holds_as_much_as_before() -> None:
    scene = with_jumps(at={34: ordered(A.PREDICTION_OFF), 36: ordered(A.PREDICTION_OFF, undo=True)})
    before: dict[str, int] = {}
    scene.at[33] = lambda s: before.update({h.name: h.num_bytes for h in holders(s.loop)})
    gone: set[str] = set()
    scene.at[35] = lambda s: gone.update(h.name for h in holders(s.loop))
    scene.run()
    assert before["snapshot"] > 0
    assert before["averages"] > 0
    assert gone == {"weights", "optimizer", "gradients"}
    assert held(scene, "averages") == before["averages"]


def test_prediction_cannot_be_taken_from_plain_training() -> None:
    scene = Uncounted(gpt_settings(PLAIN))
    assert not carry_out(scene.loop, A.PREDICTION_OFF, undo=False).done
    assert not carry_out(scene.loop, A.PREDICTION_OFF, undo=True).done
    assert not carry_out(scene.loop, A.BASIS_BF16, undo=False).done
    assert scene.loop.memory.in_force == set()


def test_training_itself_does_not_see_whether_prediction_is_there() -> None:
    scene = Uncounted(
        gpt_settings(), at={9: ordered(A.PREDICTION_OFF), 21: ordered(A.PREDICTION_OFF, undo=True)}
    )
    scene.run()
    assert same_bits(weights_of(scene.loop), weights_of(Uncounted(gpt_settings(PLAIN)).run().loop))


# ---- directions in another form ------------------------------------------------------------------


def directions_of(scene: Scene) -> list[torch.Tensor]:
    averages = scene.loop.basis.averages
    indices = range(len(scene.loop.basis.parameters))
    return [
        torch.cat([of(i).reshape(-1) for i in indices])
        for of in (averages.drift, averages.slow_drift, averages.pull_back)
    ]


@pytest.mark.parametrize("history", [0, 3])
def test_directions_in_bf16_and_back_are_as_exact_as_bf16_is(history: int) -> None:
    """Every step taken in: a conversion takes in what waits, which would move the average itself."""
    keys = ("trainer.basis.average_every_steps=1", f"trainer.basis.history_snapshots={history}")
    scene = Uncounted(gpt_settings("trainer.steps=26", *keys)).run()
    before = directions_of(scene)
    past = [d.clone() for d in scene.loop.basis.history.differences(0)] if history else []
    saved = {name: t.dtype for name, t in scene.loop.basis.tensors().items()}
    assert carry_out(scene.loop, A.BASIS_BF16, undo=False).done
    for compact, exact in zip(directions_of(scene), before, strict=True):
        # Half a unit in the last of bf16's 8 bits, and the rounding of the weights it is a difference of.
        torch.testing.assert_close(compact, exact, rtol=2**-8, atol=1e-6)
    assert carry_out(scene.loop, A.BASIS_BF16, undo=True).done
    for again, exact in zip(directions_of(scene), before, strict=True):
        torch.testing.assert_close(again, exact, rtol=2**-8, atol=1e-6)
    assert {name: t.dtype for name, t in scene.loop.basis.tensors().items()} == saved
    assert scene.loop.basis.averages.memory.tensor[0] == 26  # steps seen: the length of a growing average
    for again, exact in zip(scene.loop.basis.history.differences(0) if history else [], past, strict=True):
        torch.testing.assert_close(again, exact, rtol=2**-8, atol=0.0)


def test_the_averages_of_a_run_go_on_from_where_they_were_in_bf16() -> None:
    settings = gpt_settings("trainer.read_out=average")  # else none is kept behind the last decision
    scene = Uncounted(settings, at={16: ordered(A.BASIS_BF16), 27: ordered(A.BASIS_BF16, undo=True)}).run()
    twin = Uncounted(settings).run()
    mine, whole = directions_of(scene), directions_of(twin)
    for left, right in zip(mine, whole, strict=True):
        assert torch.nn.functional.cosine_similarity(left, right, dim=0) > 0.99


def test_on_a_cpu_the_host_is_no_other_place() -> None:
    scene = Uncounted(gpt_settings())
    done = carry_out(scene.loop, A.BASIS_HOST, undo=False)
    assert not done.done
    assert "host" in done.detail
    scene.loop.memory.in_force.add(A.BASIS_HOST)  # as a checkpoint from a GPU leaves it
    assert carry_out(scene.loop, A.BASIS_HOST, undo=True).done
    assert scene.loop.memory.in_force == set()


def test_an_order_may_be_given_twice_and_changes_nothing_the_second_time() -> None:
    """A monitor that restarts may not know that it was done, and must be able to take it back."""
    scene = Uncounted(gpt_settings())
    for action in (A.BASIS_BF16, A.RECOMPUTE, A.PREDICTION_OFF):
        assert carry_out(scene.loop, action, undo=True).done
        assert scene.loop.memory.given_up == ()
    for action in (A.BASIS_BF16, A.RECOMPUTE, A.PREDICTION_OFF):
        assert carry_out(scene.loop, action, undo=False).done
        before = scene.loop.memory.given_up, scene.loop.basis
        again = carry_out(scene.loop, action, undo=False)
        assert again.done
        assert "already" in again.detail
        assert (scene.loop.memory.given_up, scene.loop.basis) == before
    assert not carry_out(scene.loop, A.CLEANUP, undo=True).done


def test_where_memory_runs_out_on_the_way_the_order_is_not_done_and_training_goes_on() -> None:
    scene = Scene(gpt_settings())

    def run_out(scene: Scene) -> None:
        scene.order(A.BASIS_BF16)
        scene.memory.strike = lambda: within("compact_averages.py")

    scene.at[15] = run_out
    scene.run()
    (done,) = scene.links.of(OrderDone)
    assert not done.done
    assert "memory ran out" in done.detail
    assert scene.loop.progress.step == 40
    assert scene.loop.memory.in_force == {A.PREDICTION_OFF}
    assert scene.loop.basis is None
    assert scene.memory.raised == 1


@pytest.mark.parametrize("action", [A.BASIS_BF16, A.PREDICTION_OFF])
def test_a_host_or_disk_without_room_costs_the_order_and_not_the_run(
    action: MemoryAction, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To grow again takes room in the stores of directions and snapshots as well."""

    def full(store: MemoryStore, tensors: object) -> None:
        raise EnvironmentFault("no snapshot: no space left")

    scene = Uncounted(gpt_settings("trainer.steps=16"))
    assert carry_out(scene.loop, action, undo=False).done
    monkeypatch.setattr(MemoryStore, "save", full)
    done = carry_out(scene.loop, action, undo=True)
    assert not done.done
    assert "no space left" in done.detail
    monkeypatch.undo()
    assert A.PREDICTION_OFF in scene.loop.memory.in_force
    assert scene.run().loop.progress.step == 16
    assert carry_out(scene.loop, A.PREDICTION_OFF, undo=True).done


# ---- what is in force survives -------------------------------------------------------------------


def test_what_is_in_force_passes_through_json() -> None:
    state = MemoryState(halvings=2, in_force={A.RECOMPUTE, A.BASIS_BF16}, proposals_from_window=7)
    again = memory_state_from_json(json.loads(json.dumps(state.to_json())))
    assert again == state
    assert memory_state_from_json({}) == MemoryState()


def test_what_cannot_be_in_force_here_is_not_put_into_force() -> None:
    loop = tiny_loop(ScriptedLinks(), tiny_settings())
    put_in_force(loop, MemoryState(halvings=1, in_force={A.RECOMPUTE, A.BASIS_BF16}))
    assert loop.memory.given_up == (A.BASIS_BF16, A.HALVE_MICRO_BATCH)


def test_a_fresh_loop_is_put_under_what_was_in_force() -> None:
    former = Uncounted(gpt_settings())
    for action in (A.BASIS_BF16, A.RECOMPUTE, A.HALVE_MICRO_BATCH):
        assert carry_out(former.loop, action, undo=False).done
    fresh = Uncounted(gpt_settings())
    put_in_force(fresh.loop, former.loop.memory)
    assert fresh.loop.memory == former.loop.memory
    assert fresh.loop.basis.tensors().keys() == former.loop.basis.tensors().keys()
    assert all("forward" in block.__dict__ for block in fresh.task.model.blocks)
    assert fresh.loop.memory.piece_size(BatchSettings(sequences=8)) == 4
