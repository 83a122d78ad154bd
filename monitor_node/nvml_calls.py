"""One call to NVML, asked so that a missing function is an answer and not an end.

Owns the way from a name in the module `pynvml` (package nvidia-ml-py) to a value or a reason. Calls
only versioned functions: on an older driver the unversioned ones raise NVMLLibraryMismatchError, which
is no NVMLError and would end whoever catches only that one. Knows nothing of devices and readings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Numbers of NVML's interface, which never change; the package's names for them come and go.
NOT_SUPPORTED = 3
TIMEOUT = 10
_MISSING = (0, 13)  # in the package, in the driver


@dataclass(frozen=True, kw_only=True)
class Answer:
    value: Any | None
    source: str  # the call that answered, or the last one tried
    unknown_reason: str  # "" when `value` is known
    error: int = 0  # NVML's number of the failure; 0 = none, or the package lacks the function


def ask(nvml: Any, calls: Sequence[str], *arguments: Any, **options: Any) -> Answer:
    """The first of `calls` that package and driver have and that answers. Never raises an NVMLError.

    Where none does, the reason is the first that says more than that a function is missing.
    """
    failures: list[Answer] = []
    for call in calls:
        function = getattr(nvml, call, None)
        if function is None:
            reason = f"{call}: the installed nvidia-ml-py lacks it"
            failures.append(Answer(value=None, source=call, unknown_reason=reason))
            continue
        try:
            return Answer(value=function(*arguments, **options), source=call, unknown_reason="")
        except nvml.NVMLError as error:
            reason = f"{call}: {error}"
            failures.append(Answer(value=None, source=call, unknown_reason=reason, error=error.value))
    return next((failure for failure in failures if failure.error not in _MISSING), failures[-1])
