"""Scripts of fake devices: what they play, and that a mistake is one line with file, line and cure."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.clock import FakeClock
from common.errors import UserError
from common.messages import VramSample
from common.settings import MonitorSettings
from monitor_node.fake_device import BUILT_IN, FakeDevice, open_fake
from monitor_node.fake_script import parse_script
from monitor_node.thresholds import Level, LevelState, limits_of, next_level

GIB = 1 << 30


def play(text: str, *at_seconds: float) -> list[VramSample]:
    """Samples of the script at these seconds. Its second 0 is the first sample there is."""
    clock = FakeClock(1024.0)
    device = FakeDevice(parse_script(text, source="here"), clock=clock)
    read, now_seconds = [], 0.0
    if at_seconds[0] > 0:
        device.sample(None)
    for second in at_seconds:
        clock.advance(second - now_seconds)
        now_seconds = second
        read.append(device.sample(None))
    return read


def used(text: str, *at_seconds: float) -> list[float | None]:
    """GiB."""
    return [None if s.used_bytes is None else s.used_bytes / GIB for s in play(text, *at_seconds)]


def test_a_script_names_the_device_and_its_memory() -> None:
    read = play("device My card  # a comment\ntotal 8 GiB\n\n0 25%", 0)[0]
    assert (read.source, read.device, read.used_bytes, read.total_bytes) == (
        "fake", "My card", 2 * GIB, 8 * GIB,
    )  # fmt: skip
    assert (read.trainer_bytes, read.unknown_reason, read.readings) == (2 * GIB, "", ())


def test_memory_stays_as_it_is_until_the_next_line_and_after_the_last() -> None:
    assert used("0 2 GiB\n10 3GiB", 0, 9.9, 10, 1e6) == [2, 2, 3, 3]


def test_a_ramp_goes_straight_from_what_was_used_to_what_is_said() -> None:
    assert used("0 2 GiB\n10-20 4 GiB", 10, 15, 20, 30) == [2, 3, 4, 4]


@pytest.mark.parametrize(
    ("size", "size_bytes"),
    [("1 GiB", GIB), ("1 GB", 10**9), ("1.5MiB", 3 << 19), ("2 MB", 2_000_000), ("7 B", 7), ("50%", 8 * GIB)],
)
def test_sizes_have_units(size: str, size_bytes: int) -> None:
    assert play(f"0 {size}", 0)[0].used_bytes == size_bytes


def test_a_gap_is_unknown_with_the_reason_of_the_script() -> None:
    read = play("0 2 GiB\n5 lost cable is out\n8 3 GiB", 4, 5, 7, 8)
    assert [sample.used_bytes for sample in read] == [2 * GIB, None, None, 3 * GIB]
    assert read[1].unknown_reason == "cable is out"
    assert read[1].trainer_bytes is None


def test_before_the_first_line_nothing_is_known() -> None:
    read = play("5 2 GiB", 0, 5)
    assert (read[0].used_bytes, read[0].unknown_reason) == (None, "the script has not begun")
    assert read[1].used_bytes == 2 * GIB


def test_a_reading_holds_until_it_changes() -> None:
    read = play(
        "0 1 GiB\n0 temperature 50 C\n10 temperature 90.5 C\n20 temperature unknown no fan", 9, 10, 20
    )
    told = [(r.value, r.unit, r.source, r.unknown_reason) for sample in read for r in sample.readings]
    assert told == [(50.0, "C", "fake", ""), (90.5, "C", "fake", ""), (None, "1", "fake", "no fan")]


def test_an_event_is_in_one_sample_even_if_it_fell_between_two() -> None:
    read = play("0 1 GiB\n3 xid 79\n4 double_bit_ecc 2", 0, 2, 5, 6)
    told = [[(reading.name, reading.value) for reading in sample.readings] for sample in read]
    assert told == [[], [], [("xid", 79.0), ("double_bit_ecc", 2.0)], []]


def test_a_script_that_repeats_begins_again_with_its_events() -> None:
    text = "0 1 GiB\n3 xid 31\n5 2 GiB\n10 repeat"
    assert used(text, 4, 9, 10, 14, 15, 109) == [1, 2, 1, 1, 2, 2]
    assert [len(sample.readings) for sample in play(text, 0, 4, 12, 13, 24, 124)] == [0, 1, 0, 1, 1, 1]


@given(step_seconds=st.floats(0.1, 30.0))
def test_in_every_round_each_event_is_shown_however_samples_fall(step_seconds: float) -> None:
    seconds = [n * step_seconds for n in range(int(200 / step_seconds) + 1)]
    shown = [second for second, s in zip(seconds, play("0 1 GiB\n3 xid 31\n40 repeat", *seconds), strict=True)
             if s.readings]  # fmt: skip
    expected = [at for at in (3.0, 43.0, 83.0, 123.0, 163.0) if at <= seconds[-1]]
    assert len(shown) == len(expected)
    assert all(
        -1e-6 <= second - at <= step_seconds + 1e-6 for second, at in zip(shown, expected, strict=True)
    )


def test_a_host_is_no_gpu() -> None:
    assert not FakeDevice(parse_script("host\n0 1 GiB", source="here")).is_gpu
    assert FakeDevice(parse_script("0 1 GiB", source="here")).is_gpu


def test_the_demo_reaches_every_default_level_loses_its_sensor_and_comes_back() -> None:
    read = play(BUILT_IN["demo"], *range(240))
    limits = limits_of(MonitorSettings(), read[0].total_bytes)
    state, levels = LevelState(), []
    for second, sample in enumerate(read):
        state = next_level(state, used_bytes=sample.used_bytes, limits=limits, now_seconds=float(second))
        levels.append(state.level)
    assert set(levels) == set(Level)
    assert (levels[0], levels[-1]) == (Level.NORMAL, Level.NORMAL)
    assert [sample.used_bytes for sample in read].count(None) == 5
    again = play(BUILT_IN["demo"], 0, 239, 240)
    assert again[0] == again[2]


@pytest.mark.parametrize(
    ("text", "line", "cure"),
    [
        ("0 12 GX", 1, "write 6 GiB, 800 MB or 40%"),
        ("0 12", 1, "not a size"),
        ("total 40%", 1, "not a size"),
        ("total 0 B", 1, "above 0"),
        ("0 17 GiB", 1, "more than the total"),
        ("0 1e3 GiB", 1, "not a size"),
        ("0 99999999999999 GiB", 1, "more than any device has"),
        ("\n# x\n0 1 GiB\ntotal 8 GiB", 4, "must come before the first second"),
        ("speed 3", 1, "should begin with a second, or be device NAME, total SIZE or host"),
        ("device", 1, "device NAME"),
        ("10 1 GiB\n5 2 GiB", 2, "goes back; the line before was at 10"),
        ("0 1 GiB\n20-10 2 GiB", 2, "goes back"),
        ("0-10 1 GiB\n5 2 GiB", 2, "lasts until second 10"),
        ("0-10 1 GiB\n5 repeat", 2, "lasts until second 10"),
        ("0-5 lost", 1, "only used memory can have a ramp"),
        ("0", 1, "should be a second such as 10"),
        ("0x 1 GiB", 1, "should be a second such as 10"),
        ("-5 1 GiB", 1, "should begin with a second"),
        (f"{'9' * 400} 1 GiB", 1, "later than any script lasts"),
        ("0 1 GiB\n0 repeat", 2, "after a second above 0"),
        ("5 repeat", 1, "some used memory"),
        ("0 1 GiB\n5 repeat\n6 2 GiB", 3, "nothing may follow"),
        ("0 temperature hot", 1, "nor a reading"),
        ("0 temperature nan", 1, "nor a reading"),
        ("0 temperature 9 degrees C", 1, "nor a reading"),
        ("0 lots", 1, "'lost REASON'"),
    ],
)
def test_a_mistake_is_one_line_with_file_line_and_cure(
    tmp_path: Path, text: str, line: int, cure: str
) -> None:
    file = tmp_path / "card.fake"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        open_fake(str(file))
    assert str(error.value).startswith(f"{file}:{line}: ")
    assert cure in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"total 8 GiB\n"])
def test_a_script_without_memory_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "card.fake"
    file.write_bytes(content)
    with pytest.raises(UserError, match="says nothing of used memory; add a line such as '0 6 GiB'"):
        open_fake(str(file))


def test_a_file_that_is_not_there_or_no_text_names_the_cure(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No such file.*fake:demo"):
        open_fake(str(tmp_path / "none"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8 text"):
        open_fake(str(tmp_path / "binary"))


@given(st.text(alphabet="0123456789.-% GiBMxrepatlosdv#\n²٣", max_size=80))
def test_any_text_is_a_script_or_a_mistake_of_the_user(text: str) -> None:
    try:
        script = parse_script(text, source="here")
    except UserError:
        return
    device = FakeDevice(script, clock=FakeClock())
    read = device.sample(None)
    assert (read.used_bytes is None) == bool(read.unknown_reason)
    assert 0 <= (read.used_bytes or 0) <= (read.total_bytes or 0)
