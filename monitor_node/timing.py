"""Where the trainer's time goes: its own account, told in HealthSamples, as shares and a verdict. Pure.

The account is wall seconds by purpose since the run began (trainer_node/ledger.py), so two of them give what
happened in between. An account of an older start of the trainer is left out: the newer one went on from a
checkpoint, and its seconds with it. Bounded: of a long run every second account is forgotten again and again,
the first and the newest never. Decides nothing; measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from common.messages import HealthSample

PREFIX = "wall_seconds_"
TOTAL = "total"
STEPS, DATA, CORRECTIONS = "steps", "data", "corrections"  # the latter two are parts of the first
VERIFICATION, SNAPSHOTS, JUMPS, WINDOWS, WAITING = "verification", "snapshots", "jumps", "windows", "waiting"
EVALUATION, CHECKPOINTS = "evaluation", "checkpoints"
PARTS = (STEPS, VERIFICATION, SNAPSHOTS, JUMPS, WINDOWS, WAITING, EVALUATION, CHECKPOINTS)  # of the total
PURPOSES = (*PARTS, DATA, CORRECTIONS)

MAX_ACCOUNTS = 128
_NEWEST = 32  # never thinned
_MOST = 1e12  # no run takes so many seconds, steps or starts
RECENT_SECONDS = 120.0  # shares are of so much of the trainer's time, or of all there was
BOUND_SHARE = 0.2  # guess, untested: a fifth of the time is worth a word

_BOUND_BY = {
    "input-bound": (DATA,),
    "verification-bound": (VERIFICATION, SNAPSHOTS, JUMPS, WINDOWS),
    "checkpoint-bound": (CHECKPOINTS,),
    "waiting-bound": (WAITING,),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """All that the trainer had spent when it stood at `step`; seconds over all processes of the run."""

    step: int
    generation: int
    total_seconds: float
    seconds: Mapping[str, float]  # by purpose; who is missing has taken none
    lost_steps: int

    def of(self, *purposes: str) -> float:
        return sum(self.seconds.get(purpose, 0.0) for purpose in purposes)


NOTHING_SPENT = Account(step=0, generation=0, total_seconds=0.0, seconds={}, lost_steps=0)


def account_of(sample: HealthSample) -> Account | None:
    """None for a sample that does not tell it, or tells nonsense."""
    told = {metric.name: metric.value for metric in sample.metrics}
    names = {purpose: f"{PREFIX}{purpose}" for purpose in (TOTAL, *PURPOSES)}
    values = {purpose: told.get(name) for purpose, name in names.items() if told.get(name) is not None}
    numbers = [*values.values(), told.get("generation"), told.get("lost_steps")]
    if TOTAL not in values or any(n is None or not 0.0 <= n <= _MOST for n in numbers):
        return None
    seconds = {purpose: float(value or 0.0) for purpose, value in values.items()}
    return Account(
        step=sample.step,
        generation=int(told["generation"] or 0),
        total_seconds=seconds.pop(TOTAL),
        seconds=seconds,
        lost_steps=int(told["lost_steps"] or 0),
    )


@dataclass(kw_only=True)
class TimeBook:
    """Accounts of the trainer's newest start, by time."""

    accounts: list[Account] = field(default_factory=list)

    def add(self, account: Account) -> None:
        """One that is not newer than all that is known changes nothing."""
        newest = self.accounts[-1] if self.accounts else NOTHING_SPENT
        if account.generation < newest.generation:
            return
        if account.generation > newest.generation:
            self.accounts = []
        elif account.total_seconds <= newest.total_seconds:
            return
        # The run was rolled back: what stood at steps that are undone is forgotten, the time is not.
        first, later = self.accounts[:1], self.accounts[1:]
        if first and first[0].step > account.step:
            first = later = []
        self.accounts = [*first, *(a for a in later if a.step < account.step), account]
        if len(self.accounts) > MAX_ACCOUNTS:
            old, new = self.accounts[:-_NEWEST], self.accounts[-_NEWEST:]
            self.accounts = [*old[::2], *new]

    def before(self, place: int, *, seconds: float) -> Account:
        """The newest account that is `seconds` older than that at `place`, else the first."""
        newest = self.accounts[place]
        for account in reversed(self.accounts[:place]):
            if newest.total_seconds - account.total_seconds >= seconds:
                return account
        return self.accounts[0]


def shares_between(older: Account, newer: Account) -> dict[str, float]:
    """Shares of the time between the two, which add up to 1; {} before the first step."""

    def spent(*purposes: str) -> float:
        return max(0.0, newer.of(*purposes) - older.of(*purposes))

    total_seconds = max(newer.total_seconds - older.total_seconds, spent(*PARTS))
    if total_seconds <= 0.0 or spent(STEPS) <= 0.0:
        return {}
    parts = {purpose: spent(purpose) for purpose in PARTS if purpose != STEPS}
    parts[VERIFICATION] += min(spent(CORRECTIONS), spent(STEPS))
    in_steps = spent(STEPS) - min(spent(CORRECTIONS), spent(STEPS))
    parts[DATA] = min(spent(DATA), in_steps)
    parts["compute"] = in_steps - parts[DATA]
    parts["other"] = max(0.0, total_seconds - sum(parts.values()))
    whole = sum(parts.values())
    return {purpose: seconds / whole for purpose, seconds in parts.items()}


def verdict_of(shares: Mapping[str, float]) -> str | None:
    """What to look at first if it is to be faster; None = nothing is known, or nothing stands out."""
    if not shares:
        return None
    weights = {bound: sum(shares[name] for name in names) for bound, names in _BOUND_BY.items()}
    heaviest = max(weights, key=lambda bound: weights[bound])
    if weights[heaviest] >= BOUND_SHARE:
        return heaviest
    return "compute-bound" if shares["compute"] >= 0.5 else None


_IN_WORDS = {
    "compute": "computing steps",
    DATA: "waiting for data",
    VERIFICATION: "checking jumps",
    SNAPSHOTS: "snapshots",
    JUMPS: "jumping",
    WINDOWS: "closing windows",
    WAITING: "waiting for decisions",
    EVALUATION: "held-out losses",
    CHECKPOINTS: "checkpoints",
    "other": "the rest",
}


def timing_section(book: TimeBook) -> dict[str, Any]:
    shares: dict[str, float] = {}
    if book.accounts:
        older = book.before(len(book.accounts) - 1, seconds=RECENT_SECONDS)
        shares = shares_between(older, book.accounts[-1])
        shares = shares or shares_between(NOTHING_SPENT, book.accounts[-1])
    if not shares:
        return {
            "shares": {},
            "verdict": None,
            "words": "Not known yet: the trainer tells it every few seconds.",
        }
    verdict = verdict_of(shares)
    largest = sorted(shares, key=lambda name: -shares[name])[:3]
    listed = ", ".join(f"{shares[n]:.0%} {_IN_WORDS[n]}" for n in largest if shares[n] >= 0.005)
    head = verdict[0].upper() + verdict[1:] if verdict else "Nothing stands out"
    rounded = {name: round(share, 4) for name, share in shares.items()}
    return {"shares": rounded, "verdict": verdict, "words": f"{head}: {listed}."}
