"""The terminal shows what a person asks: step, phase, loss, rate, ETA, virtual share, verdicts."""

from __future__ import annotations

import io

from rich.console import Console

from common.messages import Alert, Evaluation, Outcome, Verdict
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
