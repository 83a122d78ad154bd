"""How fast the live page is: `python -m tests.bench.page [first-paint|event-to-pixel|points|day]...`.

    first-paint     a long run's page on loopback, opened in headless Chromium with an empty and a full cache
    event-to-pixel  a step handed to the server -> drawn in a browser, with 19 more viewers; every part is
                    real but the trainer: private server, `monitor-node serve`, its page
    points          the same as first-paint for a run of 1,000,000 steps with a loss and a held-out loss each
    day             86,400 simulated seconds of viewers who lose their connection and resume: no network

Without a name all four. Prints tables with machine and date; asserts nothing. The first three need Chromium.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import messages as m
from common.clock import FakeClock
from monitor_node.run_reader import new_view
from monitor_node.snapshot import as_dict
from tests.bench.live_page import Viewers, delays, page_process, percentile
from tests.bench.live_run import LiveRun, machine, table
from tests.monitor import fake_run as fake
from tests.monitor.browser import Browser, chromium_path
from tests.monitor.long_watch import watch

NAMES = ("first-paint", "event-to-pixel", "points", "day")
OTHER_VIEWERS = 19
CHART_DEADLINE_SECONDS = 10.0
SETTLE_SECONDS = 3.0
DAY_EVERY_SECONDS = 4.0  # at the monitor's own four a second it would take an hour

# Runs in the page before its own scripts. `steps`: what #words showed when, in ms since 1970: changed, and
# drawn = the second animation frame after it, so that the frame with it is out. The rest is in ms since the
# navigation began. The chart is there when the page says so (__charts_ready), else when a canvas or a path of
# plotly's is.
WATCHER = """
(() => {
  const seen = (window.__bench = { data: null, drawn: null, charts: null, steps: [] });
  const afterTwoFrames = (then) => requestAnimationFrame(() => requestAnimationFrame(then));
  let last = null;
  const look = () => {
    const words = document.getElementById("words");
    const found = words && /step ([\\d,]+)/.exec(words.textContent);
    if (!found || found[1] === last) return;
    last = found[1];
    const row = [Number(last.replaceAll(",", "")), Date.now(), null];
    seen.steps.push(row);
    if (seen.data === null) {
      seen.data = performance.now();
      afterTwoFrames(() => { seen.drawn = performance.now(); });
    }
    afterTwoFrames(() => { row[2] = Date.now(); });
  };
  new MutationObserver(look).observe(document, { subtree: true, childList: true, characterData: true });
  const hasChart = () => {
    if ("__charts_ready" in window) return Boolean(window.__charts_ready);
    const canvas = document.querySelector("canvas");
    return Boolean(document.querySelector(".scatterlayer path.js-line")) || (canvas && canvas.width !== 300);
  };
  const eachFrame = () => {
    if (hasChart()) afterTwoFrames(() => { seen.charts = performance.now(); });
    else requestAnimationFrame(eachFrame);
  };
  requestAnimationFrame(eachFrame);
})();
"""


def browser() -> Browser:
    program = chromium_path()
    if program is None:
        raise SystemExit("chromium is not installed: apt install chromium")
    made = Browser(program)
    made.show(width=1280, height=900)
    made.call("Page.addScriptToEvaluateOnNewDocument", source=WATCHER)
    return made


def opened(page: Browser, url: str, *, is_cold: bool) -> dict[str, float | None]:
    """Milliseconds since the navigation began; None = not within the deadline."""
    if is_cold:
        page.call("Network.clearBrowserCache")
    page.open("about:blank")
    page.wait_until("location.href === 'about:blank'")
    page.open(url)
    page.wait_until("window.__bench.drawn !== null")
    deadline = time.monotonic() + CHART_DEADLINE_SECONDS
    while page.evaluate("window.__bench.charts") is None and time.monotonic() < deadline:
        time.sleep(0.05)
    paint = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
    return {
        "first paint of anything": page.evaluate(paint),
        "data in the page": page.evaluate("window.__bench.data"),
        "data drawn": page.evaluate("window.__bench.drawn"),
        "chart drawn": page.evaluate("window.__bench.charts"),
    }


def opening_rows(url: str, repeats: int) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    with browser() as page:
        for label, is_cold in (("empty cache", True), ("full cache", False)):
            found = [opened(page, url, is_cold=is_cold) for _ in range(repeats)]
            for name in found[0]:
                values = [times[name] for times in found]
                known = [value for value in values if value is not None]
                missing = f", {len(values) - len(known)} never" if len(known) < len(values) else ""
                shown = (f"{statistics.median(known):,.0f} ms", f"{max(known):,.0f} ms{missing}")
                rows.append((label, name, *(shown if known else ("never", "never"))))
        for complaint in page.complaints:
            print(f"the page complains: {complaint}")
    return rows


def first_paint(options: argparse.Namespace) -> None:
    print(f"\n## First paint with data: a run of {options.steps:,} steps, {options.repeats} openings each\n")
    with page_process(options.steps) as shown:
        print(f"snapshot {shown.snapshot_bytes / 1024:,.0f} KiB, {shown.snapshot_seconds * 1e3:.0f} ms\n")
        print(table(("", "", "median", "longest"), opening_rows(shown.url, options.repeats)))


def points(options: argparse.Namespace) -> None:
    print(f"\n## {options.points:,} points each of loss and held-out loss, {options.repeats} openings each\n")
    with page_process(options.points, has_every_series=True) as shown:
        rows = ", ".join(f"{name} {count}" for name, count in shown.rows.items() if count)
        print(f"folded in {shown.fold_seconds:.0f} s of a processor; snapshot", end=" ")
        print(f"{shown.snapshot_bytes / 1024:,.0f} KiB in {shown.snapshot_seconds * 1e3:.0f} ms;")
        print(f"rows that the page gets, extremes kept: {rows}\n")
        print(table(("", "", "median", "longest"), opening_rows(shown.url, options.repeats)))


def event_to_pixel(options: argparse.Namespace) -> None:
    print(f"\n## Event to pixel: {1 + OTHER_VIEWERS} viewers, 10 steps a second, {options.seconds:.0f} s\n")
    with (
        tempfile.TemporaryDirectory() as folder,
        LiveRun(Path(folder), earlier_steps=options.earlier_steps) as run,
        browser() as page,
    ):
        run.run_for(SETTLE_SECONDS)
        page.open(run.url)
        page.wait_until("window.__bench.drawn !== null")
        with Viewers(run.url, OTHER_VIEWERS) as viewers:
            run.run_for(SETTLE_SECONDS)
            told = run.run_for(options.seconds)
            run.run_for(SETTLE_SECONDS)  # so that the last ones are seen, or overtaken
            steps = page.evaluate("window.__bench.steps")
        events = [delay for seen in viewers.seen for delay in delays(told, seen)]
        changed = delays(told, [(step, ms / 1e3) for step, ms, _ in steps])
        drawn = delays(told, [(step, ms / 1e3) for step, _, ms in steps if ms is not None])
    print(f"{len(told)} steps; from handing a step to the server until that step or a later one is there\n")
    rows = [
        (f"event at the {OTHER_VIEWERS} viewers that only read", *shown_delays(events)),
        ("text changed in the browser", *shown_delays(changed)),
        ("drawn in the browser", *shown_delays(drawn)),
    ]
    print(table(("", "p50", "p99", "longest", "never"), rows))


def shown_delays(found: list[float]) -> tuple[str, ...]:
    known = [delay for delay in found if math.isfinite(delay)] or [math.nan]
    shares = (percentile(known, 0.5), percentile(known, 0.99), max(known))
    return (*(f"{1e3 * seconds:,.0f} ms" for seconds in shares), str(sum(map(math.isinf, found))))


def day(options: argparse.Namespace) -> None:
    """The real view and feed; a step and a snapshot each DAY_EVERY_SECONDS."""
    print(f"\n## A day of reconnects: {options.day_seconds:,} simulated seconds, 4 viewers, 24 restarts\n")
    view, clock, rng = new_view("bench"), FakeClock(), random.Random(0)
    begun_seconds = time.perf_counter()
    found = watch(
        _live_snapshots(view, clock, rng, options.day_seconds),
        view,
        seconds=options.day_seconds,
        every_seconds=DAY_EVERY_SECONDS,
    )
    quarter = max(1, len(found.held_bytes) // 4)
    held = [max(found.held_bytes[i : i + quarter]) / 1024 for i in range(0, 4 * quarter, quarter)]
    rows: list[tuple[str, ...]] = [
        ("snapshots published, revisions", f"{found.publishes:,}, {found.revisions:,}"),
        ("events to viewers", f"{found.events:,}"),
        ("reconnects, longest absence", f"{found.reconnects:,}, {found.longest_away_seconds / 60:.0f} min"),
        ("gaps", str(found.gaps)),
        ("duplicates", str(found.duplicates)),
        ("held by view and feed, at most, by quarter of the day", " · ".join(f"{k:,.0f} KiB" for k in held)),
    ]
    print(table(("", f"took {time.perf_counter() - begun_seconds:.0f} s"), rows))


def _live_snapshots(
    view: Any, clock: FakeClock, rng: random.Random, total_steps: int
) -> Iterator[dict[str, Any]]:
    """Each after a step, heartbeats and a reading of memory."""
    view.fold(fake.started("bench", steps=total_steps), sent_unix_seconds=0.0, at_seconds=0.0)
    step = 0
    while True:
        clock.advance(DAY_EVERY_SECONDS)
        step += 1
        now_seconds = clock.monotonic()
        said = [
            fake.observation(step, 2.0 + rng.gauss(0.0, 0.05)),
            *(fake.heartbeat(node, step, uptime_seconds=now_seconds) for node in ("trainer", "predictor")),
            fake.sample(int(rng.uniform(8.5, 9.5) * 2**30)),
        ]
        if step % 64 == 0:
            said += [fake.decision(step, 10), fake.outcome(step, m.Verdict.ACCEPTED)]
        for message in said:
            view.fold(message, sent_unix_seconds=now_seconds, at_seconds=now_seconds)
        yield as_dict(view, now_seconds=now_seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--steps", type=int, default=20_000, help="of the long run, first-paint")
    parser.add_argument("--repeats", type=int, default=10, help="openings, first-paint and points")
    parser.add_argument("--earlier-steps", type=int, default=20_000, help="before event-to-pixel")
    parser.add_argument("--seconds", type=float, default=60.0, help="of event-to-pixel")
    parser.add_argument("--points", type=int, default=1_000_000)
    parser.add_argument("--day-seconds", type=int, default=86_400)
    options = parser.parse_args()
    if wrong := set(options.names) - set(NAMES):
        parser.error(f"no such benchmark: {', '.join(sorted(wrong))}; give some of {', '.join(NAMES)}")
    print(machine())
    for name in NAMES:
        if name in (options.names or NAMES):
            globals()[name.replace("-", "_")](options)


if __name__ == "__main__":
    main()
