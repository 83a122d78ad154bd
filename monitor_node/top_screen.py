"""What `monitor-node top` shows: one snapshot drawn as lines for a terminal of a given size.

Pure; owns the layout. Every name and sentence of a run is shown as plain text: no markup of rich is
read from it, and no control character reaches the terminal. Colour only repeats what a word says.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Group
from rich.text import Text

DASH = "–"
_BLOCKS = " ▁▂▃▄▅▆▇█"
_IN_ASCII = str.maketrans(_BLOCKS + "━─┃–…·×→", " ..::-=+##-|-~.x>")
_MAX_TEXT = 400  # characters of one text that a run sent; no screen shows more
_STATUS_STYLES = {
    "running": "bold green", "finished": "bold green", "stalled": "bold yellow",
    "stopping": "bold yellow", "crashed": "bold red",
}  # fmt: skip
_VERDICTS = {"accepted": ("kept", "green"), "refused": ("undone", "red"), "ruined": ("undone at once", "red"),
             "aborted": ("undone", "red")}  # fmt: skip
_LIVENESS_STYLES = {"alive": "green", "stalled": "yellow", "silent": "bold red"}
_SEVERITY_STYLES = {"warning": "yellow", "error": "bold red"}
_LIMITS = (("clean-up", "cleanup"), ("emergency", "emergency"))
_GIB = 2**30


def screen(
    snapshot: Mapping[str, Any],
    width: int,
    height: int,
    *,
    footer: str = "q leaves",
    ascii_only: bool = False,
) -> Group:
    """At most `height` lines of at most `width` cells. `snapshot`: snapshot.as_dict, or {} before it."""
    lines = _body(snapshot, width, height - 1) if snapshot else [Text("Reading the run.")]
    shown = lines[: max(0, height - 1)]
    if footer:
        shown.append(_line((clean(footer), "dim")))
    for line in shown:
        line.truncate(width, overflow="ellipsis")
    return Group(*(_in_ascii(line) for line in shown) if ascii_only else shown)


def clean(value: Any, limit: int = _MAX_TEXT) -> str:
    """Text of a stream as one printable line: what would steer the terminal is shown as a mark."""
    text = DASH if value is None else str(value)[:limit]
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def sparkline(
    points: Sequence[Sequence[Any]], marks: Sequence[Sequence[Any]], width: int, height: int
) -> list[str]:
    """`height` rows of `width` block characters. points: rows [x, y, ...] sorted by x; marks: rows
    [x, text]. A column shows the mean of what falls into it, on a log scale where all are positive; × on top
    stands for a value that is no number.
    """
    known = [(float(row[0]), float(row[1])) for row in points if row[1] is not None]
    if not known or width < 1 or height < 1:
        return []
    use_log = min(y for _, y in known) > 0
    first = known[0][0]
    span = max(known[-1][0] - first, 1e-9)
    columns: list[list[float]] = [[] for _ in range(width)]
    for x, y in known:
        columns[min(width - 1, int((x - first) / span * width))].append(math.log(y) if use_log else y)
    means = [sum(column) / len(column) if column else None for column in columns]
    low = min(mean for mean in means if mean is not None)
    high = max(mean for mean in means if mean is not None)
    eighths: list[int] = []
    for mean in means:
        if mean is not None:
            eighths.append(1 + round((mean - low) / ((high - low) or 1.0) * (8 * height - 1)))
        else:
            eighths.append(eighths[-1] if eighths else 0)  # between two points the curve goes on
    rows = [
        [_BLOCKS[min(8, max(0, level - 8 * below))] for level in eighths]
        for below in range(height - 1, -1, -1)
    ]
    for x, _ in marks:
        if first <= x <= first + span:
            rows[0][min(width - 1, int((x - first) / span * width))] = "×"
    return ["".join(row) for row in rows]


def _body(snapshot: Mapping[str, Any], width: int, height: int) -> list[Text]:
    """The fixed lines, and what is left of `height` shared by curve, proposals and events."""
    head = [*_title(snapshot, width), *_progress(snapshot, width)]
    nodes, memory = _nodes(snapshot), _memory(snapshot, width)
    left = max(0, height - len(head) - len(nodes) - len(memory) - 2)  # two headings
    num_curve = min(8, max(1, left // 3))
    num_proposals = min(8, max(1, left // 3))
    return [
        *head,
        *_curve(snapshot, width, num_curve),
        *_proposals(snapshot, num_proposals),
        *nodes,
        *memory,
        *_events(snapshot, max(1, left - num_curve - num_proposals)),
    ]


def _title(snapshot: Mapping[str, Any], width: int) -> list[Text]:
    run = snapshot["run"]
    status = clean(run["status"])
    title = _line((clean(run["run_id"], 64), "bold"), ("  ", ""))
    title.append(status.upper(), _STATUS_STYLES.get(status, "bold"))
    words = textwrap.wrap(clean(run["words"]), max(10, width))
    return [title, *(Text(line) for line in words[:3])]


def _progress(snapshot: Mapping[str, Any], width: int) -> list[Text]:
    now = snapshot["progress"]
    step, total = now["step"], now["total_steps"]
    share = min(1.0, step / total) if total else None
    numbers = f" {_count(step)}/{_count(total)}"
    if share is not None:
        numbers += f" {share:.0%}"
    if now["steps_per_second"] is not None:
        numbers += f"  {now['steps_per_second']:.2g} steps/s"
    if now["units_per_second"] is not None:
        numbers += f"  {_count(now['units_per_second'])} {clean(now['unit'], 12)}/s"
    numbers += f"  ETA {_duration(now['eta_seconds'])}"
    bar_width = max(8, width - len(numbers) - 1)
    filled = round(bar_width * (share or 0.0))
    bar = _line(("━" * filled, "green"), ("─" * (bar_width - filled), "dim"), (numbers, ""))
    facts = [
        f"loss {_number(now, 'loss')}",
        f"held-out {_number(now, 'held_out_loss_first')} → {_number(now, 'held_out_loss')}",
        f"phase {clean(now['phase'], 12)}",
        f"virtual {now['virtual_share']:.1%}",
        f"undone {_count(now['lost_steps'])}",
    ]
    return [bar, Text("  ".join(facts)), *_controls(snapshot, width)]


def _controls(snapshot: Mapping[str, Any], width: int) -> list[Text]:
    """What the predictor may change besides weights, in at most three lines; none of a run without it."""
    controls = snapshot.get("controls")
    if not controls:
        return []
    heading = "Controls  "
    words = textwrap.wrap(heading + clean(controls["words"]), max(20, width), subsequent_indent="  ")
    first = _line((heading, "bold"), (words[0].removeprefix(heading), ""))
    return [first, *(Text(line) for line in words[1:3])]


def _curve(snapshot: Mapping[str, Any], width: int, height: int) -> list[Text]:
    """The training loss; the held-out loss where there is no other."""
    name = "train" if snapshot["series"]["train"] else "held_out"
    rows = sparkline(snapshot["series"][name], snapshot["marks"][name], width, height)
    return [Text(row, style="cyan") for row in rows]


def _proposals(snapshot: Mapping[str, Any], num_rows: int) -> list[Text]:
    counters = snapshot["counters"]
    undone = sum(counters.get(name, 0) for name in ("refused", "ruined", "aborted"))
    heading = _line(
        ("Proposals", "bold"),
        (f"  {_count(counters.get('accepted', 0))} kept, {_count(undone)} undone", ""),
        (f", {_count(counters.get('vetoed', 0))} vetoed, {_count(counters.get('rest', 0))} rests", ""),
    )
    tried = [row for row in snapshot["proposals"] if row["verdict"] != "rest"][:num_rows]
    if not tried:
        return [heading, _line(("  no jump was tried so far", "dim"))]
    return [heading, *map(_proposal, tried)]


def _proposal(row: Mapping[str, Any]) -> Text:
    word, style = _VERDICTS.get(row["verdict"], (clean(row["verdict"], 14), "yellow"))
    line = _line(
        (f"  step {_count(row['step']):>8}  +{row['horizon_steps']:<4} ", ""), (f"{word:<15}", style)
    )
    if row["loss_end"] is not None and row["loss_forecast"] is not None:
        line.append(f"{row['loss_end']:.4f} against {row['loss_forecast']:.4f} without")
    elif row["verdict"] == "ruined":
        line.append(f"loss became {_number(row, 'loss_after')}")
    if row["cost_seconds"] is not None:
        line.append(f"  cost {_duration(row['cost_seconds'])}")
    return line


def _nodes(snapshot: Mapping[str, Any]) -> list[Text]:
    lines = [_line(("Nodes", "bold"))]
    for node in snapshot["nodes"]:
        liveness = clean(node["liveness"], 12)
        lines.append(
            _line(
                (f"  {clean(node['node'], 12):<10} ", ""),
                (f"{liveness:<9} ", _LIVENESS_STYLES.get(liveness, "")),
                (f"{clean(node['state'], 12):<9} step {_count(node['step']):<10}", ""),
                (f" heartbeat {_duration(node['heartbeat_age_seconds'])} ago", "dim"),
            )
        )
    return lines


def _memory(snapshot: Mapping[str, Any], width: int) -> list[Text]:
    memory = snapshot["memory"]
    used, total = memory["used_bytes"], memory["total_bytes"]
    heading = ("Memory ", "bold")
    if used is None or not total:
        return [_line(heading, (f" unknown: {clean(memory['unknown_reason'])}", "yellow"))]
    limits = [(name, memory.get(f"{key}_bytes")) for name, key in _LIMITS]
    words = f" {used / _GIB:.1f} of {total / _GIB:.1f} GiB  {clean(memory['level'], 14)}"
    words += "".join(f"  {name} at {value / _GIB:.1f}" for name, value in limits if value)
    bar_width = max(10, min(30, width - len(words) - 8))
    filled = round(bar_width * min(1.0, used / total))
    cells = ["━" if cell < filled else "─" for cell in range(bar_width)]
    for _, value in limits:
        if value and value <= total:
            cells[min(bar_width - 1, int(bar_width * value / total))] = "┃"
    is_over = any(value and used >= value for _, value in limits)
    return [_line(heading, ("".join(cells), "red" if is_over else "green"), (words, ""))]


def _events(snapshot: Mapping[str, Any], num_rows: int) -> list[Text]:
    """Alerts and orders, newest first."""
    events: list[tuple[float, Text]] = []
    for row in snapshot["alerts"]:
        severity = clean(row["severity"], 8)
        said = ((f"{severity} ", _SEVERITY_STYLES.get(severity, "")), (clean(row["text"]), ""))
        events.append((row["at_unix_seconds"] or 0.0, _line(*said)))
    for row in snapshot["orders"]:
        answer = "refused" if row["refused"] else "done" if row["done"] else "asked"
        said = ((f"order {clean(row['action'], 30)} {answer} ", "cyan"), (clean(row["reason"]), ""))
        events.append((row["at_unix_seconds"] or 0.0, _line(*said)))
    events.sort(key=lambda event: -event[0])
    heading = _line(("Alerts and orders", "bold"))
    if not events:
        return [heading, _line(("  none", "dim"))]
    return [heading, *(_line((f"  {_clock(at)} ", "dim")) + text for at, text in events[:num_rows])]


def _line(*parts: tuple[str, str]) -> Text:
    """Text of (characters, style): characters are never read as markup."""
    return Text.assemble(*parts, no_wrap=True, overflow="ellipsis")


def _in_ascii(line: Text) -> Text:
    """The same cells for a terminal that shows nothing else; one character stays one character."""
    plain = line.plain.translate(_IN_ASCII).encode("ascii", "replace").decode("ascii")
    return Text(plain, style=line.style, no_wrap=True, spans=line.spans)


def _count(value: float | None) -> str:
    return DASH if value is None else f"{round(value):,}"


def _number(owner: Mapping[str, Any], key: str) -> str:
    """A number, its marker (NaN, inf) when it is none, a dash when it is not known."""
    value = owner.get(key)
    return f"{value:.4f}" if value is not None else clean(owner.get(f"{key}_marker"), 8)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02} h"


def _clock(unix_seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(unix_seconds):%H:%M:%S}"
    except (OverflowError, ValueError, OSError):  # a sender's clock may say anything
        return "--:--:--"
