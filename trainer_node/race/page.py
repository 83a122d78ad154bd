"""The page of a race: one HTML file with everything in it, pictures too. No script, light and dark.

Arranges what others have computed, drawn and worded.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from trainer_node.race.arms import ARMS
from trainer_node.race.figures import RaceFigures
from trainer_node.race.rules import headline_arm
from trainer_node.race.words import headline, reservations

COLUMN_MEANINGS = (
    ("arm", "contestant"),
    ("speed", "seconds of the reference / seconds of the arm, median of the per-seed ratios"),
    ("95 %", "bootstrap interval of that median"),
    ("won", "seeds on which the arm was faster"),
    ("p", "exact two-sided sign test"),
    ("seconds", "to the target, median over seeds, predictor on the trainer's core"),
    ("passes", "forward-equivalents to the target: step 3, check 1, undone ones included"),
    ("loss at T0", "held-out loss after the base budget of steps"),
    ("missed", "seeds that never reached the target"),
    ("read", "end: at the end of a planned run; raw, read: the first held-out reading at the target counts"),
)
CAPTIONS = {
    "ratio": "Time to the target: right of the line is faster. A bar across the line shows no difference."
    " Hollow: ours or an average with a part taken out or added.",
    "loss-steps": "Held-out loss against kept steps of the task's batch. Checks, undone steps and predictor"
    " cost nothing here.",
    "loss-seconds": "The same against seconds, with everything paid: this is the axis that counts.",
    "loss-passes": "The same against forward-equivalents: independent of the machine.",
    "timeline": "One run. Undone steps were taken on probation and restored; it went on without the jump.",
    "calibration": "Below the line, forecasts are too sure of themselves; above it, too unsure.",
}
STYLE = """
:root { color-scheme: light dark; --ground: #f4f5f7; --panel: #fff; --ink: #1b2330; --soft: #5d6878;
  --rule: #dfe3e9; --ours: #a84a00; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #12161d; --panel: #1a202a; --ink: #e4e9f1; --soft: #97a3b6;
    --rule: #2c3543; --ours: #ffab6b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 1.2rem; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.4rem; margin: .2rem 0 .8rem; } h2 { font-size: 1.05rem; margin: 1.8rem 0 .5rem; }
.headline { font-size: 1.15rem; margin: 0 0 .8rem; }
.panel { background: var(--panel); border: 1px solid var(--rule); border-radius: .6rem;
  padding: 1rem 1.2rem; margin-bottom: .6rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { font-weight: 500; color: var(--soft); text-align: right; } td { text-align: right; }
th, td { padding: .32rem .9rem .32rem 0; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
tr:last-child td { border-bottom: 0; } tr.ours td { color: var(--ours); font-weight: 600; }
figure { margin: 0 0 1rem; } figcaption { color: var(--soft); font-size: .9rem; margin-top: .35rem; }
/* Pictures have a white ground of their own: legible in both themes. */
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: .5rem; padding: .5rem;
  border: 1px solid var(--rule); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: 0; font-size: .93rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
pre { font: .9em ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap; margin: 0;
  overflow-wrap: anywhere; }
ul { margin: 0; padding-left: 1.2rem; } li { margin: .2rem 0; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
"""


def page_html(
    figures: RaceFigures,
    rows: Sequence[Sequence[str]],
    pictures: Mapping[str, Path],
    notes: Sequence[str],
) -> str:
    """`rows`: cells in the order of COLUMN_MEANINGS. `notes`: what could not be done."""
    race = figures.race
    parts = [
        f"<h1>Race: {escape(race.task)}, rule “{escape(race.rule)}”</h1>",
        f'<p class="headline">{escape(headline(figures))}</p>',
        _section("What this does not say", f'<div class="panel">{_bullets(reservations(figures))}</div>'),
        _section("Results", _table(figures, rows)),
    ]
    if figures.missing or notes:
        parts.append(_section("Missing", f'<div class="panel">{_bullets([*figures.missing, *notes])}</div>'))
    if pictures:
        parts.append(_section("Pictures", "".join(_picture(name, path) for name, path in pictures.items())))
    parts += [
        _section("The arms", _definitions([(arm, _meaning(figures, arm)) for arm in race.arms])),
        _section("Protocol", _definitions(_protocol(figures))),
        _section("Run it again", f'<div class="panel"><pre>{escape(race.command)}</pre></div>'),
    ]
    title = f"Race: {escape(race.task)}, {escape(race.rule)}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>"


def _bullets(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _definitions(pairs: Sequence[tuple[str, str]]) -> str:
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in pairs)
    return f'<div class="panel"><dl>{items}</dl></div>'


def _table(figures: RaceFigures, rows: Sequence[Sequence[str]]) -> str:
    ours = headline_arm(figures.race.arms, figures.race.rule)
    head = "".join(f'<th title="{escape(text)}">{escape(name)}</th>' for name, text in COLUMN_MEANINGS)
    body = "".join(
        f"<tr{' class=ours' if row[0] == ours else ''}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row)
        + "</tr>"
        for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="panel wide">{table}</div>\n{_definitions(COLUMN_MEANINGS[1:])}'


def _picture(name: str, path: Path) -> str:
    image = base64.b64encode(path.read_bytes()).decode("ascii")
    caption = CAPTIONS[name]
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{image}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>\n"
    )


def _meaning(figures: RaceFigures, arm: str) -> str:
    meaning = ARMS[arm].meaning if arm in ARMS else "an arm of your own"
    if arm not in figures.race.tuned:
        return f"{meaning}; not tuned yet"
    config = ", ".join(f"{name} = {value}" for name, value in figures.race.tuned[arm])
    return f"{meaning} ({config})" if config else meaning


def _trials(figures: RaceFigures) -> str:
    race = figures.race
    if (plain := max(race.total_trials, race.trials)) == race.trials:
        return f"{race.trials} trials an arm"
    own = f"one around another takes over its choice and has {race.trials} of its own"
    return f"{plain} trials a plain arm; {own}"


def _protocol(figures: RaceFigures) -> list[tuple[str, str]]:
    race = figures.race
    target = "not known yet" if race.target is None else f"held-out loss {race.target:.5g}"
    seeds = f"{len(race.seeds)}: {', '.join(map(str, race.seeds))}"
    return [
        ("target", f"{target}: median end of the best plain arm at T0, fixed before the other arms raced"),
        ("reference", race.reference_arm or "not known yet"),
        ("base budget", f"T0 = {race.base_steps:,} steps"),
        ("seeds", f"{seeds}; a seed fixes first weights and batches in every arm"),
        ("tuning", f"{_trials(figures)}, at T0, on a seed that does not race"),
        (
            "crossing, decayed rate",
            "final loss over planned length, monotone, interpolated over log(length) for each seed;"
            " nothing is extrapolated",
        ),
        (
            "crossing, constant rate",
            "first held-out reading at the target, linear between readings, not smoothed",
        ),
        (
            "time",
            "of the one core that trainer and predictor share (on a GPU: wall-clock), held-out readings"
            " not counted in any arm; report.json also has the predictor on a spare core",
        ),
        ("misses", "infinitely slow; seeds on which both arms missed are left out of the comparison"),
        (
            "interval",
            "percentile bootstrap of the median of per-seed ratios, 10,000 resamples; p is not corrected"
            " for the number of arms",
        ),
        ("machine", race.machine),
        ("date", race.date),
    ]
