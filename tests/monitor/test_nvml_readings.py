"""Codes in words: brakes, advice, Xid."""

from __future__ import annotations

import pynvml
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitor_node.nvml_events import NAMES
from monitor_node.nvml_readings import throttle_facts
from monitor_node.xid import XidKind, judge_xid


def test_a_gpu_that_idles_or_runs_at_the_clocks_it_was_given_is_not_held_back() -> None:
    free = (
        pynvml.nvmlClocksEventReasonGpuIdle
        | pynvml.nvmlClocksEventReasonApplicationsClocksSetting
        | pynvml.nvmlClocksEventReasonDisplayClockSetting
    )
    assert throttle_facts(free) == {"throttle": 0.0}


@pytest.mark.parametrize(
    ("mask", "name"),
    [
        (pynvml.nvmlClocksEventReasonSwPowerCap, "sw-power-cap"),
        (pynvml.nvmlClocksEventReasonHwSlowdown, "hw-slowdown"),
        (pynvml.nvmlClocksEventReasonSyncBoost, "sync-boost"),
        (pynvml.nvmlClocksEventReasonSwThermalSlowdown, "sw-thermal"),
        (pynvml.nvmlClocksEventReasonHwThermalSlowdown, "hw-thermal"),
        (pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown, "hw-power-brake"),
        (1 << 40, "bit-0x10000000000"),
    ],
)
def test_each_brake_has_its_name_and_one_of_tomorrow_its_bit(mask: int, name: str) -> None:
    assert throttle_facts(mask | 1) == {"throttle": 1.0, f"throttle.{name}": 1.0}


@given(st.integers(0, (1 << 64) - 1))
def test_the_number_of_brakes_is_the_number_of_their_names(mask: int) -> None:
    facts = throttle_facts(mask)
    assert facts["throttle"] == len(facts) - 1


def test_the_events_are_those_of_the_package() -> None:
    assert set(NAMES) == {
        pynvml.nvmlEventTypeDoubleBitEccError,
        pynvml.nvmlEventTypeXidCriticalError,
        pynvml.nvmlEventTypeDramRetirementEvent,
        pynvml.nvmlEventTypeDramRetirementFailure,
        pynvml.nvmlEventTypeNonFatalPoisonError,
        pynvml.nvmlEventTypeFatalPoisonError,
        pynvml.nvmlEventTypeGpuUnavailableError,
        pynvml.nvmlEventTypeGpuRecoveryAction,
    }


@pytest.mark.parametrize("code", [13, 31, 43, 45, 68, 109])
def test_an_xid_of_a_program_does_not_condemn_the_gpu(code: int) -> None:
    verdict = judge_xid(code)
    assert verdict.kind is XidKind.APPLICATION
    assert "sound" in verdict.text


@pytest.mark.parametrize(("code", "words"), [(48, "ECC"), (79, "fallen off the bus")])
def test_an_xid_that_ends_a_gpu_is_fatal_and_names_the_cure(code: int, words: str) -> None:
    verdict = judge_xid(code)
    assert verdict.kind is XidKind.FATAL
    assert words in verdict.text


@given(st.integers(0, 1 << 32).filter(lambda code: code not in {13, 31, 43, 45, 68, 109, 48, 79}))
def test_any_other_xid_is_suspect_until_it_was_looked_up(code: int) -> None:
    assert judge_xid(code).kind is XidKind.SUSPECT
    assert judge_xid(code).text.startswith(f"Xid {code}: ")
