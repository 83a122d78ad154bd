"""What is switched on, and whether it can ever act in this run: pure, said before the first step.

A switch that does nothing is a mistake of whoever set it. Changes no settings.
"""

from __future__ import annotations

from common.control_rules import any_on
from common.control_settings import ControlSettings
from common.errors import SettingsError
from common.settings import RunSettings
from common.trying import why_never

SWITCHES = ("rate", "batch", "context", "decay", "read_out")


def switched_on(controls: ControlSettings) -> list[str]:
    return [name for name in SWITCHES if getattr(controls, name)]


def plan_words(settings: RunSettings) -> str:
    """What prediction may do in this run where that is not the usual, "" where it is."""
    why = why_never(settings)
    on = ", ".join(name.replace("_", "-") for name in switched_on(settings.trainer.controls))
    if not on:
        return f"plain training, observed: {why}" if why else ""
    share = f"trials may cost {settings.predictor.control_share:.1%} of the run"
    return f"the predictor may change {on}: {share}" + (f"; no jumps: {why}" if why else "")


def usable(settings: RunSettings) -> RunSettings:
    """The same settings. Raises SettingsError where a switch would be on for nothing."""
    trainer, controls = settings.trainer, settings.trainer.controls
    if not any_on(controls):
        return settings
    if not settings.predictor.enabled:
        raise SettingsError(
            "[trainer.controls] is on, but predictor.enabled = false: nobody would change a control;"
            " set predictor.enabled = true or leave the controls off"
        )
    if controls.context and trainer.task != "language":
        raise SettingsError(
            f"trainer.controls.context = true: task {trainer.task} has no context; leave it off"
        )
    if controls.context and not _shorter_contexts(trainer.model.context_tokens, controls.context_low_tokens):
        raise SettingsError(
            f"trainer.controls.context = true: nothing from {controls.context_low_tokens} tokens up divides"
            f" {trainer.model.context_tokens}; lower trainer.controls.context_low_tokens or leave it off"
        )
    if controls.decay and trainer.schedule.name != "wsd":
        raise SettingsError(
            f"trainer.controls.decay = true: schedule {trainer.schedule.name} has no tail to move;"
            ' set trainer.schedule.name = "wsd" or leave it off'
        )
    if controls.read_out and trainer.read_out == "average":
        raise SettingsError(
            'trainer.controls.read_out = true: trainer.read_out = "average" hands the averages out already;'
            " leave one of them off"
        )
    return settings


def _shorter_contexts(whole_tokens: int, low_tokens: int) -> list[int]:
    return [tokens for tokens in range(low_tokens, whole_tokens) if whole_tokens % tokens == 0]
