"""Which policy a run asks for, with a pilot before it where a control is on.

The learned one is imported late: it needs torch, the fixed one does not.
"""

from __future__ import annotations

from common.control_rules import any_on
from common.settings import RunSettings
from common.trying import keeps_directions
from predictor_node.fixed_policy import FixedPolicy
from predictor_node.piloted import PilotedPolicy
from predictor_node.policy import Policy
from predictor_node.resting_policy import RestingPolicy
from predictor_node.state import RunFacts


def policy_for(settings: RunSettings, facts: RunFacts) -> Policy:
    """A fresh policy. Raises CheckpointError when `predictor.state` names a state that cannot be used."""
    jumps = _jumps_for(settings, facts)
    return PilotedPolicy(settings, jumps) if any_on(settings.trainer.controls) else jumps


def _jumps_for(settings: RunSettings, facts: RunFacts) -> Policy:
    is_learned, is_warm = settings.predictor.policy == "learned", bool(settings.predictor.state)
    if is_learned and not is_warm and not keeps_directions(settings):
        return RestingPolicy(settings)
    if is_learned:
        from predictor_node.learned import LearnedPolicy

        return LearnedPolicy(settings, facts)
    return FixedPolicy(settings)
