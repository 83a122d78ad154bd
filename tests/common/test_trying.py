"""Laws of the question whether a run can ever try a jump: trainer and predictor must give one answer."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from common.config import load_settings
from common.settings import RunSettings
from common.trying import keeps_directions, least_steps, may_ever_jump, why_never
from predictor_node.arms import arms_of
from predictor_node.experience import Experience

tempers = st.sampled_from(["conservative", "balanced", "aggressive"])


def settings(*overrides: str) -> RunSettings:
    return load_settings(overrides=("trainer.schedule.warmup_steps=0", *overrides))


@given(
    temper=tempers,
    steps=st.integers(1, 20_000),
    probation_steps=st.integers(1, 100),
    accumulation=st.integers(1, 8),
    guard_batches=st.integers(1, 8),
)
def test_where_the_trainer_keeps_no_directions_the_predictor_would_never_have_jumped(
    temper: str, steps: int, probation_steps: int, accumulation: int, guard_batches: int
) -> None:
    run = settings(
        f"predictor.temper={temper}",
        f"trainer.steps={steps}",
        f"trainer.probation_steps={probation_steps}",
        f"trainer.batch.accumulation={accumulation}",
        f"trainer.verify.guard_batches={guard_batches}",
    )
    predictor = Experience(run, [arm.name for arm in arms_of(run)])
    assert may_ever_jump(run) == predictor.can_ever_afford()


@given(temper=tempers)
def test_the_run_it_names_is_the_shortest_that_may_jump(temper: str) -> None:
    steps = least_steps(settings(f"predictor.temper={temper}"))
    long_enough = settings(f"predictor.temper={temper}", f"trainer.steps={steps}")
    too_short = settings(f"predictor.temper={temper}", f"trainer.steps={steps - 1}")
    assert may_ever_jump(long_enough)
    assert why_never(long_enough) == ""
    assert not may_ever_jump(too_short)
    assert f"{steps:,} would do" in why_never(too_short)


def test_a_fixed_policy_knows_no_budget() -> None:
    assert may_ever_jump(settings("predictor.policy=fixed", "trainer.steps=20"))


def test_a_short_run_keeps_directions_where_something_else_needs_them() -> None:
    short = ("trainer.steps=20", "predictor.policy=learned")
    assert not keeps_directions(settings(*short))
    assert keeps_directions(settings(*short, "trainer.read_out=average"))
    assert keeps_directions(settings(*short, "trainer.basis.history_snapshots=5"))
    assert not keeps_directions(settings("predictor.enabled=false"))
