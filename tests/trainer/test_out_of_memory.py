"""Memory that runs out costs speed, a jump or the prediction; never a step, and never a wrong weight."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch

from common.messages import (
    Alert,
    CheckpointWritten,
    Evaluation,
    MemoryAction,
    MemoryReport,
    Observation,
    Outcome,
    PhaseDecision,
    Verdict,
)
from tests.trainer.memory_scene import Scene, gpt_settings, ordered
from tests.trainer.simulated_memory import within
from tests.trainer.small_job import bits
from tests.trainer.test_loop import proposal
from tests.trainer.tiny import ScriptedLinks, same_bits, weights_of
from trainer_node import out_of_memory, real_step
from trainer_node.checkpoint import Checkpoints
from trainer_node.housekeeping import Housekeeping
from trainer_node.loop import Loop
from trainer_node.out_of_memory import (
    MemoryExhausted,
    OutOfMemory,
    Picture,
    TornUpdate,
    attempt,
    is_out_of_memory,
)
from trainer_node.snapshot import optimizer_tensors, random_state

PLAIN = "predictor.enabled=false"
Uncounted = partial(Scene, is_counted=False)


def strike_once(scene: Scene, *names: str, after: int = 0) -> None:
    """Memory runs out once, `after` new storages within these files or functions."""
    left = [after]

    def strike() -> bool:
        if left[0] < 0 or not within(*names):
            return False
        left[0] -= 1
        return left[0] < 0

    scene.memory.strike = strike


def state_of(loop: Loop) -> list[bytes]:
    tensors = [*loop.task.model.parameters(), *optimizer_tensors(loop.optimizers), torch.get_rng_state()]
    return [bits(tensor) for tensor in tensors]


@dataclass(frozen=True)
class Ended:
    losses: list[float]
    weights: list[torch.Tensor]  # only read


@cache
def undisturbed(*overrides: str) -> Ended:
    """The same run with memory enough."""
    scene = Uncounted(gpt_settings(*overrides)).run()
    return Ended(scene.losses, weights_of(scene.loop))


# ---- in a forward or backward pass ---------------------------------------------------------------


@cache
def budget_for(micro_batch: int, *overrides: str) -> float:
    """Bytes that steps of 8 sequences need in such pieces, a window's end included, and a little more."""
    cut = (f"trainer.batch.sequences={micro_batch}", f"trainer.batch.accumulation={8 // micro_batch}")
    scene = Scene(gpt_settings("trainer.steps=16", *cut, *overrides)).run()
    return 1.02 * max(scene.peak_bytes.values())


@pytest.mark.parametrize(("prediction", "micro_batch"), [("true", 4), ("false", 2)])
def test_a_run_short_of_memory_has_the_losses_of_one_that_is_not(prediction: str, micro_batch: int) -> None:
    key = f"predictor.enabled={prediction}"
    settings = gpt_settings(key, "trainer.steps=24")
    short = Scene(settings, budget_bytes=budget_for(micro_batch, key)).run()
    assert short.loop.memory.micro_batch(settings.trainer.batch) == micro_batch
    assert short.loop.memory.in_force == set()
    assert short.loop.progress.step == 24
    assert short.loop.ledger.lost_steps == 0
    assert [o.step for o in short.links.of(Observation)] == list(range(1, 25))
    np.testing.assert_allclose(short.losses, Uncounted(settings).run().losses, rtol=1e-4)


def test_what_the_traceback_held_is_free_before_the_batch_is_done_again() -> None:
    """One halving is enough here, but only if nothing of the failed pass is alive during the next one."""
    scene = Scene(gpt_settings(PLAIN, "trainer.steps=6"), budget_bytes=budget_for(4, PLAIN)).run()
    assert scene.memory.raised == 1
    assert scene.loop.memory.halvings == 1


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_step_that_is_done_again_has_the_random_numbers_of_the_first_time(where: str) -> None:
    """Dropout: bit for bit the run that had the smaller micro-batch from that step on."""
    settings = gpt_settings(PLAIN, "trainer.model.dropout=0.3", "trainer.steps=12")
    scene = Scene(settings)
    scene.at[5] = lambda s: strike_once(s, "make_gradients", where, after=9)
    scene.run()
    assert scene.memory.raised == 1
    twin = Uncounted(settings, at={5: ordered(MemoryAction.HALVE_MICRO_BATCH)}).run()
    assert state_of(scene.loop)[:-1] == state_of(twin.loop)[:-1]


def test_a_shortage_on_probation_costs_neither_the_step_nor_the_jump() -> None:
    links = ScriptedLinks(answer=lambda o: proposal(o, drift=0.1))
    settings = gpt_settings("trainer.verify.tolerance=100.0", "trainer.steps=26")
    scene = Scene(settings, links=links)
    scene.memory.strike = lambda: (
        scene.memory.raised == 0
        and scene.loop._jump is not None
        and len(scene.loop._jump.step_seconds) == 2
        and within("make_gradients", "backward")
    )
    scene.run()
    assert scene.memory.raised == 1
    verdicts = [o.verdict for o in links.of(Outcome)]
    assert verdicts[0] is Verdict.ACCEPTED
    assert [o.step for o in links.of(Observation)] == list(range(1, 27))
    twin = ScriptedLinks(answer=lambda o: proposal(o, drift=0.1))
    np.testing.assert_allclose(scene.losses, Uncounted(settings, links=twin).run().losses, rtol=1e-4)


def test_a_shortage_is_told_counted_and_reported() -> None:
    scene = Scene(gpt_settings(PLAIN, "trainer.steps=12"))
    scene.at[5] = lambda s: strike_once(s, "make_gradients", "backward")
    scene.run()
    (alert,) = [a for a in scene.links.of(Alert) if a.kind == "out_of_memory"]
    assert "2 x 4" in alert.text
    assert "\n" not in alert.text
    (report,) = [r for r in scene.links.of(MemoryReport) if r.occasion == "out-of-memory"]
    assert (report.out_of_memory, report.micro_batch, report.accumulation, report.step) == (1, 4, 2, 5)


def test_an_evaluation_that_does_not_fit_is_done_in_smaller_pieces() -> None:
    settings = gpt_settings(PLAIN, "trainer.steps=12", "trainer.evaluate_every_steps=5")
    scene, twin = Scene(settings), Uncounted(settings)
    scene.at[5] = lambda s: strike_once(s, "_losses", "forward", after=3)
    scene.run(), twin.run()
    assert scene.memory.raised == 1
    assert scene.loop.memory.halvings == 1
    assert scene.housekeeping.last_loss == pytest.approx(twin.housekeeping.last_loss, rel=1e-4)


def test_an_evaluation_that_does_not_fit_at_all_is_left_out_and_training_goes_on() -> None:
    settings = gpt_settings(PLAIN, "trainer.steps=12", "trainer.evaluate_every_steps=5")
    scene = Scene(settings)
    scene.memory.strike = lambda: within("_measure")
    scene.run()
    assert scene.loop.progress.step == 12
    assert scene.links.of(Evaluation) == []
    assert "left out" in scene.links.of(Alert)[-1].text


def test_averaged_weights_that_do_not_fit_are_left_out_and_the_run_ends_with_its_own_checkpoint(
    tmp_path: Path,
) -> None:
    settings = gpt_settings("trainer.read_out=average", "trainer.steps=12")
    scene = Scene(settings)
    checkpoints = Checkpoints(tmp_path, keep=1, on_failure=pytest.fail)
    scene.housekeeping = Housekeeping(scene.links.emit, checkpoints)
    scene.run()
    scene.memory.strike = lambda: within("weights_that_count")
    with scene.memory:
        scene.housekeeping.end(scene.loop, emergency=False)
    assert scene.memory.raised > 0
    written = scene.links.of(CheckpointWritten)[-1]
    assert written.step == 12


# ---- at the floor --------------------------------------------------------------------------------


def test_at_the_floor_blocks_recompute_then_prediction_goes_and_then_the_run_ends_whole() -> None:
    scene = Scene(gpt_settings())
    before: list[list[bytes]] = []

    def no_more(scene: Scene) -> None:
        before.append(state_of(scene.loop))
        scene.memory.strike = lambda: within("make_gradients")

    scene.at[16] = no_more
    with pytest.raises(MemoryExhausted, match="smaller trainer") as error:
        scene.run()
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 1
    assert scene.loop.memory.in_force == {MemoryAction.RECOMPUTE, MemoryAction.PREDICTION_OFF}
    assert scene.loop.memory.micro_batch(scene.settings.trainer.batch) == 1
    assert scene.loop.progress.step == 16
    assert scene.loop.is_calm
    assert state_of(scene.loop) == before[0]


def test_a_step_on_probation_that_does_not_fit_at_all_costs_the_jump_and_not_the_run() -> None:
    links = ScriptedLinks(answer=lambda o: proposal(o, drift=0.1) if o.step == 14 and not o.attempt else None)
    settings = gpt_settings("trainer.steps=24")
    scene = Scene(settings, links=links)
    scene.memory.strike = lambda: (
        scene.loop._jump is not None and len(scene.loop._jump.step_seconds) == 3 and within("make_gradients")
    )
    scene.run()
    failed = next(o for o in links.of(Outcome) if o.verdict is Verdict.FAILED)
    assert (failed.base_step, failed.lost_steps) == (14, 3)
    assert scene.loop.memory.micro_batch(settings.trainer.batch) == 1
    assert scene.loop.memory.in_force == set()
    assert scene.loop.progress.step == 24
    np.testing.assert_allclose(scene.losses, Uncounted(settings).run().losses, rtol=1e-4)


def test_a_run_that_ends_for_lack_of_memory_comes_to_rest_before_the_jump() -> None:
    scene = Scene(gpt_settings(), links=ScriptedLinks(answer=lambda o: proposal(o, drift=0.1)))
    at_point: list[list[bytes]] = []

    def answer(observation: Observation) -> PhaseDecision:
        at_point.append([bits(w) for w in weights_of(scene.loop)])
        return proposal(observation, drift=0.1)

    scene.links.answer = answer
    scene.memory.strike = lambda: bool(at_point) and within("make_gradients")
    with pytest.raises(MemoryExhausted):
        scene.run()
    assert [o.verdict for o in scene.links.of(Outcome)] == [Verdict.FAILED]
    assert scene.loop.progress.step == 14
    assert scene.loop.is_calm
    assert [bits(w) for w in weights_of(scene.loop)] == at_point[0]


# ---- where weights are written -------------------------------------------------------------------


def test_a_shortage_in_the_update_ends_the_run_and_says_that_nothing_is_saved() -> None:
    scene = Scene(gpt_settings(PLAIN))
    scene.at[5] = lambda s: strike_once(s, "update")
    with pytest.raises(TornUpdate, match="resume the run") as error:
        scene.run()
    assert not isinstance(error.value, MemoryExhausted)
    assert "\n" not in str(error.value)


def test_a_shortage_in_the_update_on_probation_goes_back_to_before_the_jump() -> None:
    links = ScriptedLinks(answer=lambda o: proposal(o, drift=0.1) if o.step == 14 and not o.attempt else None)
    scene = Scene(gpt_settings("trainer.steps=30"), links=links)
    scene.memory.strike = lambda: (
        scene.memory.raised == 0
        and scene.loop._jump is not None
        and len(scene.loop._jump.step_seconds) == 3
        and within("update")
    )
    scene.run()
    assert scene.memory.raised == 1
    failed = next(o for o in links.of(Outcome) if o.verdict is Verdict.FAILED)
    assert (failed.base_step, failed.lost_steps) == (14, 3)
    assert scene.loop.ledger.lost_steps == 3
    assert scene.loop.memory.out_of_memory == 1
    assert scene.loop.progress.step == 30
    assert same_bits(weights_of(scene.loop), undisturbed("trainer.steps=30").weights)


JUMP_PLACES = {
    "snapshot": ("take_snapshot", "_add_bytes"),  # else room for the copies, which are on the host
    "first check": ("_look",),
    "directions": ("_look_and_leap", "linear_deltas"),
    "second check": ("_move_and_check", "_guard_loss"),
    "judgement": ("_judge_jump",),
}


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("place", JUMP_PLACES)
def test_a_jump_without_memory_fails_and_leaves_no_bit_behind(place: str, chunks: int) -> None:
    def answer(observation: Observation) -> PhaseDecision | None:
        return replace(proposal(observation), chunks=chunks) if observation.step == 14 else None

    links = ScriptedLinks(answer=lambda o: answer(o) if not o.attempt else None)
    scene = Scene(gpt_settings("trainer.steps=30", "trainer.verify.tolerance=100.0"), links=links)
    # From here on, all of it: a check that is done again in smaller pieces must not fit either.
    names = JUMP_PLACES[place] if (place, chunks) != ("directions", 1) else ("_look_and_leap", "apply_delta")

    def strike() -> bool:
        is_over = scene.loop.progress.step < 14 or scene.loop.ledger.verdicts[Verdict.FAILED] > 0
        return not is_over and within(*names) and not within("fail_jump")

    scene.memory.strike = strike
    scene.run()
    assert scene.memory.raised >= 1
    (outcome,) = [o for o in links.of(Outcome) if o.base_step == 14 and o.verdict is not Verdict.MISSING]
    assert outcome.verdict is Verdict.FAILED
    assert outcome.lost_steps == (6 if place == "judgement" else 0)
    assert scene.loop.ledger.verdicts[Verdict.FAILED] == 1
    assert scene.loop.memory.out_of_memory >= 1
    assert [a.kind for a in links.of(Alert)].count("out_of_memory") == scene.loop.memory.out_of_memory
    scene.loop.memory.halvings = 0
    twin = undisturbed("trainer.steps=30")
    np.testing.assert_allclose(scene.losses, twin.losses, rtol=1e-4)
    if scene.loop.progress.attempt == 0 and "check" not in place:
        assert same_bits(weights_of(scene.loop), twin.weights)


def test_a_jump_in_parts_whose_second_part_does_not_fit_is_undone_whole() -> None:
    links = ScriptedLinks(
        answer=lambda o: replace(proposal(o, drift=0.1), chunks=3) if o.step == 14 else None
    )
    scene = Scene(gpt_settings("trainer.steps=30", "trainer.verify.tolerance=100.0"), links=links)
    seen: list[int] = []

    def strike() -> bool:
        if scene.loop.progress.step != 14 or seen[1:] or not within("parts.py", "move"):
            return False
        if not within("sampled"):
            return bool(seen) and (seen.append(2) or True)
        seen[:] = seen or [1]
        return False

    scene.memory.strike = strike
    scene.run()
    assert scene.memory.raised == 1
    assert next(o.verdict for o in links.of(Outcome) if o.base_step == 14) is Verdict.FAILED
    assert same_bits(weights_of(scene.loop), undisturbed("trainer.steps=30").weights)


# ---- where directions are kept -------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "names"), [
    ("bf16", ("after_step",)), ("bf16", ("before_step",)), ("fp32", ("close_window",)),
])  # fmt: skip
def test_a_shortage_among_the_directions_costs_the_prediction_and_no_bit_of_training(
    dtype: str, names: tuple[str, ...]
) -> None:
    links = ScriptedLinks(answer=lambda o: proposal(o, drift=0.1) if o.step > 20 else None)
    scene = Scene(gpt_settings(f"trainer.basis.dtype={dtype}"), links=links)
    scene.at[15] = lambda s: strike_once(s, *names)
    scene.run()
    assert scene.memory.raised == 1
    assert scene.loop.basis is None
    assert scene.loop.memory.in_force == {MemoryAction.PREDICTION_OFF}
    assert scene.loop.ledger.applied == 0
    assert [a.kind for a in links.of(Alert)] == ["out_of_memory"]
    assert same_bits(weights_of(scene.loop), undisturbed(PLAIN).weights)


def test_directions_lost_on_probation_take_the_jump_with_them() -> None:
    links = ScriptedLinks(answer=lambda o: proposal(o, drift=0.1) if not o.attempt else None)
    scene = Scene(gpt_settings("trainer.basis.dtype=bf16", "trainer.steps=30"), links=links)
    scene.memory.strike = lambda: (
        scene.memory.raised == 0 and scene.loop._jump is not None and within("after_step")
    )
    scene.run()
    assert links.of(Outcome)[0].verdict is Verdict.FAILED
    assert scene.loop.basis is None
    assert scene.loop.progress.step == 30
    plain = Uncounted(gpt_settings(PLAIN, "trainer.steps=30")).run()
    assert same_bits(weights_of(scene.loop), weights_of(plain.loop))


# ---- the error itself ----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: can't allocate memory"),
    MemoryExhausted(OutOfMemory("CUDA out of memory.")),
])  # fmt: skip
def test_every_kind_of_shortage_is_known(error: Exception) -> None:
    def work() -> None:
        raise error

    found = attempt(work)
    assert isinstance(found, OutOfMemory)
    assert found.text
    assert "\n" not in found.text


OTHERS = [RuntimeError("shape mismatch"), ValueError("out of memory"), TornUpdate("x", OutOfMemory("memory"))]


@pytest.mark.parametrize("error", OTHERS, ids=repr)
def test_other_errors_are_not_taken_for_one(error: Exception) -> None:
    def work() -> None:
        raise error

    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    with pytest.raises(type(error)):
        attempt(work)


def test_the_error_of_a_real_allocation_on_this_machine_is_known() -> None:
    assert isinstance(attempt(lambda: torch.empty(1 << 60, dtype=torch.uint8)), OutOfMemory)


def test_nothing_of_a_failed_attempt_is_alive_after_it() -> None:
    alive: list[object] = []

    class Held:
        def __init__(self) -> None:
            alive.append(id(self))

        def __del__(self) -> None:
            alive.clear()

    def work() -> None:
        held = Held()
        raise torch.OutOfMemoryError(str(id(held)))

    seen: list[int] = []
    attempt(work, at_once=lambda: seen.append(len(alive)))
    assert seen == [1]
    assert alive == []
    assert sys.exc_info() == (None, None, None)


# ---- the picture ---------------------------------------------------------------------------------

GPU = torch.device("cuda")


def test_the_second_picture_has_the_lines_that_allocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    dump = lambda path: (calls.append("dump"), Path(path).write_bytes(b"x"))  # noqa: E731
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump, raising=False)
    monkeypatch.setattr(
        torch.cuda.memory, "_record_memory_history", lambda **_: calls.append("record"), raising=False
    )
    picture = Picture(tmp_path, GPU)
    picture.take()
    picture.take()
    assert calls == ["dump", "record", "dump"]
    assert (tmp_path / out_of_memory.PICTURE_NAME).exists()


@pytest.mark.parametrize("is_there", [True, False])
def test_without_torchs_private_functions_there_is_no_picture_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    if is_there:
        monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: 1 / 0, raising=False)
    else:
        monkeypatch.delattr(torch.cuda.memory, "_dump_snapshot", raising=False)
    Picture(tmp_path, GPU).take()
    assert list(tmp_path.iterdir()) == []


def test_on_a_cpu_there_is_no_picture(tmp_path: Path) -> None:
    scene = Scene(gpt_settings(PLAIN, "trainer.steps=6"), folder=tmp_path)
    strike_once(scene, "make_gradients")
    scene.run()
    assert scene.memory.raised == 1
    assert list(tmp_path.iterdir()) == []


def test_the_loss_is_finite_where_the_last_piece_is_smaller() -> None:
    settings = gpt_settings(PLAIN, "trainer.batch.sequences=7", "trainer.steps=6")
    scene = Scene(settings, budget_bytes=budget_for(2, PLAIN)).run()
    assert all(math.isfinite(loss) for loss in scene.losses)


def test_the_random_state_is_copied_only_for_a_model_that_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    monkeypatch.setattr(real_step, "random_state", lambda device: copies.append(1) or random_state(device))
    Scene(gpt_settings(PLAIN, "trainer.steps=6")).run()
    assert len(copies) == 2  # before and after the first step
    copies.clear()
    Scene(gpt_settings(PLAIN, "trainer.model.dropout=0.3", "trainer.steps=6")).run()
    assert len(copies) == 7
