"""The terminal shows what a person asks: step, phase, loss, rate, ETA, virtual share, verdicts."""

from __future__ import annotations

import io

from rich.console import Console

from common.features import NAMES
from common.messages import Alert, Evaluation, Observation, Outcome, Phase, Verdict
from tests.trainer.test_loop import proposal
from tests.trainer.tiny import ScriptedLinks, tiny_loop, tiny_settings
from trainer_node.display import Display


def shown(*, terminal: bool, width: int = 160) -> tuple[str, Display, ScriptedLinks]:
    links = ScriptedLinks(answer=lambda o: proposal(o, drift=0.2))
    tiny_loop(links, tiny_settings("trainer.verify.tolerance=100.0")).run()
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=width)
    display = Display(total_steps=60, first_step=0, units_per_step=16, unit="images", console=console)
    for message in links.said:
        display.put(message)
    display.put(Evaluation(step=60, virtual_steps=0, loss=1.25, accuracy=None, train_seconds=0.0))
    display.put(Alert(node="trainer", severity="error", kind="x", text="disk [full]", step=60))
    display.close()
    return screen.getvalue(), display, links


def test_the_bar_shows_phase_step_loss_rate_eta_share_and_verdicts() -> None:
    text, display, links = shown(terminal=True)
    accepted = sum(o.verdict is Verdict.ACCEPTED for o in links.of(Outcome))
    assert accepted > 0
    for part in (
        "60/60",
        "full",
        "loss ",
        "held-out 1.250",
        "images/s",
        "ETA 0:00",
        "virtual ",
        f"✓{accepted}",
    ):
        assert part in text, part
    assert f"✓{accepted} ✗0" in display.numbers()


def test_an_alert_is_shown_as_text_even_with_brackets() -> None:
    text, _, _ = shown(terminal=False)
    assert "error: disk [full]" in text


def test_nothing_is_cut_off_on_a_terminal_of_80_columns() -> None:
    text, display, _ = shown(terminal=True, width=80)
    assert display.numbers() in text
    assert "60/60" in text
    assert "…" not in text


def test_the_total_follows_the_batch_in_force_and_not_the_average_so_far() -> None:
    """100 steps of a run of 1,000, then twice the batch: 450 more. Then a tail ends it at 600."""
    display = Display(total_steps=1000, first_step=0, units_per_step=32, unit="images")
    clock, totals = 0.0, {}
    for step in range(1, 221):
        clock += 2.0 if step > 100 else 1.0
        end = 1000.0 if step <= 150 else 600.0
        display.put(seen_at(step, progress=clock / end))
        totals[step] = display._total_steps
    assert (totals[1], totals[99], totals[110], totals[150]) == (1000, 1000, 550, 550)
    assert set(totals.values()) == {1000, 550, 350}
    assert totals[220] == 350


def seen_at(step: int, *, progress: float) -> Observation:
    values = dict.fromkeys(NAMES, 0.0) | {"progress": progress, "log10_units_per_step": 1.5}
    return Observation(
        step=step, attempt=0, phase=Phase.FULL, features=tuple(values.values()), gradient_norms=(),
        decision_point=None,
    )  # fmt: skip
