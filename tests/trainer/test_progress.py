import json
import math

import numpy as np
import pytest

from common.messages import Controls, Phase
from trainer_node.before_jump import before_jump
from trainer_node.phases import PhaseRules, PhaseState
from trainer_node.progress import first_progress, progress_from_json
from trainer_node.spikes import CLEAR_STEPS
from trainer_node.verify import MIN_FIT_POINTS, GuardRecord, line_forecast

RULES = PhaseRules(statistics_steps=4, window_steps=6, probation_steps=5, total_steps=100)


def progress_with(losses, rules=RULES):
    progress = first_progress(rules)
    progress.recent_losses.extend(losses)
    return progress


@pytest.mark.parametrize("rotten", [math.nan, math.inf, -math.inf])
def test_a_non_finite_recent_loss_neither_stops_the_run_nor_hides_the_noise(rotten):
    clean = before_jump(progress_with([2.0, 2.5, 2.0, 2.5]), 0.0).loss_noise
    before = before_jump(progress_with([2.0, 2.5, 2.0, 2.5, rotten]), 0.0)
    assert before.loss_noise == clean > 0
    assert before_jump(progress_with([rotten, rotten]), 0.0).loss_noise == 0.0


def test_a_trend_is_no_noise():
    assert before_jump(progress_with([4 - step / 4 for step in range(12)]), 0.0).loss_noise == 0.0


def test_the_noise_is_the_deviation_of_a_single_loss():
    rules = PhaseRules(statistics_steps=1, window_steps=2000, probation_steps=1, total_steps=9999)
    losses = 3 - np.arange(4000) / 1000 + 0.2 * np.random.default_rng(0).normal(size=4000)
    assert before_jump(progress_with(losses.tolist(), rules), 0.0).loss_noise == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("window_steps", [2, 3, 4, 16])
def test_enough_losses_are_kept_for_a_forecast_however_short_the_window(window_steps):
    rules = PhaseRules(statistics_steps=4, window_steps=window_steps, probation_steps=5, total_steps=100)
    for progress in (first_progress(rules), progress_from_json(first_progress(rules).to_json(), rules)):
        progress.recent_losses.extend(float(step) for step in range(100))
        assert len(progress.recent_losses) == max(2 * window_steps, MIN_FIT_POINTS)
        assert math.isfinite(line_forecast(progress.recent_losses, horizon_steps=5).spread)


def test_progress_survives_json():
    progress = progress_with([2.0, 1.5])
    progress.step, progress.attempt = 17, 2
    progress.phase = PhaseState(Phase.CORRECT, 3, windows=4, used_decision="9.0", window_steps=48)
    progress.guard = GuardRecord(changes=[(6.0, -0.25), (5.5, 0.125)], step=9.5, loss=1.75)
    progress.skipped_steps, progress.rollbacks, progress.spike_step = 5, 2, 12
    again = progress_from_json(json.loads(json.dumps(progress.to_json())), RULES)
    assert repr(again) == repr(progress)  # by text, as NaN is not equal to itself
    assert again.recent_losses.maxlen == progress.recent_losses.maxlen


def test_a_copy_does_not_follow_its_original():
    progress = progress_with([2.0])
    copy = progress.copy()
    before = repr(copy)
    progress.recent_losses.append(1.0)
    progress.features.losses.push(1.0)
    progress.guard.move_to(3, 1.0)
    progress.step += 1
    assert repr(copy) == before


def test_a_restore_sets_all_back_but_what_was_learned_of_the_guard():
    progress = progress_with([2.0])
    former = progress.copy()
    progress.step, progress.guard.changes = 9, [(6, 0.5)]
    restored = progress.after_restore(former, attempt=4)
    assert (restored.step, restored.attempt, restored.guard.changes) == (0, 4, [(6, 0.5)])


def test_a_rollback_goes_back_in_steps_and_on_in_data_and_attempts():
    progress = progress_with([2.0])
    progress.step, progress.attempt, progress.skipped_steps = 10, 3, 4
    progress.features.all_passes, progress.features.virtual_steps = 30.0, 2
    former = progress.copy()
    progress.step, progress.features.all_passes, progress.features.virtual_steps = 17, 51.0, 9
    back = progress.after_rollback(former, step_passes=3.0)
    assert (back.step, back.attempt, back.data_step) == (10, 4, progress.data_step)
    features = back.features
    assert (features.attempts, features.all_passes, features.lost_passes) == (4, 51.0, 21.0)
    assert features.virtual_steps == 2
    assert (former.features.attempts, former.attempt) == (0, 3)


def test_rollbacks_count_in_a_row_until_the_run_is_well_past_the_spike():
    progress = progress_with([])
    progress.step, progress.rollbacks, progress.spike_step = 100, 2, 100
    assert progress.rollbacks_next == 3
    progress.step = 100 + CLEAR_STEPS
    assert progress.rollbacks_next == 3
    progress.step += 1
    assert progress.rollbacks_next == 1


def test_a_checkpoint_from_before_there_was_a_record_of_the_guard_is_read():
    values = progress_with([2.0]).to_json()
    newer = ("controls", "extra_steps", "extra_data_steps")
    for key in ("guard", "skipped_steps", "rollbacks", "spike_step", *newer):
        del values[key]
    del values["phase"]["window_steps"]
    assert progress_from_json(values, RULES).guard.changes == []


def test_controls_and_their_clock_survive_json_and_are_set_back_by_a_restore():
    progress = progress_with([2.0])
    former = progress.copy()
    progress.controls = Controls(
        rate_factor=0.5, batch_factor=4.0, decay_start=50, decay_steps=9, read_out="average"
    )
    progress.step, progress.extra_steps, progress.extra_data_steps = 9, 12.25, 13.5
    again = progress_from_json(json.loads(json.dumps(progress.to_json())), RULES)
    assert repr(again) == repr(progress)
    assert (again.clock, again.data_step) == (21.25, 22.5)
    restored = progress.after_restore(former, attempt=1)
    assert (restored.controls, restored.clock, restored.data_step) == (Controls(), 0, 0)


def test_a_rollback_takes_clock_and_controls_of_the_checkpoint_and_data_that_go_on():
    progress = progress_with([2.0])
    progress.controls, progress.step = Controls(batch_factor=2.0), 10
    progress.extra_steps = progress.extra_data_steps = 4.0
    former = progress.copy()
    progress.controls, progress.step = Controls(batch_factor=0.5), 16
    progress.extra_steps = progress.extra_data_steps = 1.0
    back = progress.after_rollback(former, step_passes=3.0)
    assert (back.controls, back.clock, back.data_step) == (Controls(batch_factor=2.0), 14.0, 17.0)
    assert back.features.lost_passes == 3.0 * (17 - 14)
    again = progress.after_rollback(former, step_passes=3.0).after_rollback(former, step_passes=3.0)
    assert again.data_step == 17.0
