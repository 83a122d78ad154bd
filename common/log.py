"""JSON lines for people and scripts: {"t", "level", "node", "run_id", "event", ...fields}.

Never a password: bus addresses are logged as `BusAddress.shown`.
"""

import json
import sys
import time
from typing import Any, TextIO


class NodeLog:
    """One node's log. Cheap enough for events, not for steps."""

    def __init__(self, node: str, run_id: str, stream: TextIO | None = None) -> None:
        self._fixed = {"node": node, "run_id": run_id}
        self._stream = stream

    def event(self, event: str, *, level: str = "info", **fields: Any) -> None:
        record = {"t": round(time.time(), 3), "level": level, **self._fixed, "event": event, **fields}
        stream = self._stream or sys.stderr
        stream.write(json.dumps(record, default=str, allow_nan=True) + "\n")
        stream.flush()
