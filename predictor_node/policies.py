"""Which policy a run asks for, with a pilot before it where a control is on, and what it starts from.

The learned one is imported late: it needs torch, the fixed one does not.
"""

from __future__ import annotations

from common.control_rules import any_on
from common.errors import CheckpointError
from common.settings import RunSettings
from common.trying import keeps_directions
from predictor_node.fixed_policy import FixedPolicy
from predictor_node.piloted import PilotedPolicy, without_pilot
from predictor_node.policy import Policy, PolicyState
from predictor_node.resting_policy import RestingPolicy
from predictor_node.state import RunFacts
from predictor_node.warm_start import FIT_AGAIN, read_warm_start


def policy_for(settings: RunSettings, facts: RunFacts, saved: PolicyState | None = None) -> Policy:
    """One that goes on from `saved`, the state of this very run, or a fresh one.

    Raises CheckpointError for a state that cannot be used: `saved`, or else what `predictor.state` names.
    """
    jumps = _jumps_for(settings, facts, is_new=saved is None)
    policy = PilotedPolicy(settings, jumps) if any_on(settings.trainer.controls) else jumps
    if saved is not None:
        policy.load(saved if isinstance(policy, PilotedPolicy) else without_pilot(saved))
    return policy


def _jumps_for(settings: RunSettings, facts: RunFacts, *, is_new: bool) -> Policy:
    is_learned, path = settings.predictor.policy == "learned", settings.predictor.state
    if is_learned and not path and not keeps_directions(settings):
        return RestingPolicy(settings)
    if not is_learned:
        return FixedPolicy(settings)

    from predictor_node.learned import LearnedPolicy

    policy = LearnedPolicy(settings, facts)
    if path and is_new:
        state = read_warm_start(path)
        try:
            policy.start_warm(state)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}; {FIT_AGAIN}") from None
    return policy
