"""The pictures of the live page in docs/: `python -m tests.bench.page_pictures [--into FOLDER] [--steps N]`.

A real `trainer-node up` run, small so that it takes a minute or two: a tiny GPT on the standard library's
source, the fixed rule with long jumps so that some are refused, a clean-up ordered every so many steps and
one checkpoint asked for through the page. Headless Chromium looks at it while it trains: light, dark, and as
wide as a phone. Judges nothing: look at the pictures. The numbers are those of the machine that it runs on.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from tests.monitor.browser import Browser, chromium_path
from tests.monitor.shown_page import wait_for_charts

RUN_ID, TOKEN = "a-small-gpt", "only-for-the-pictures"
SETTINGS = (
    "trainer.model.layers=2",
    "trainer.model.width=64",
    "trainer.model.context_tokens=64",
    "trainer.batch.sequences=8",
    "trainer.evaluate_every_steps=50",
    "trainer.checkpoint.every_steps=200",
    'predictor.policy="fixed"',
    "predictor.horizon_steps=[5, 10, 15, 30]",
    "monitor.cleanup_every_steps=300",
)
LOOKS = (("page.png", 1280, False), ("page-dark.png", 1280, True), ("page-phone.png", 390, False))
SHARE_SEEN = 0.85  # of the steps, when the pictures are taken: the run is still running
START_SECONDS, RUN_SECONDS, STOP_SECONDS = 120.0, 1800.0, 120.0


@contextmanager
def running(folder: Path, steps: int) -> Iterator[str]:
    """The address of the page of a run that trains; stops it in the end."""
    command = [sys.executable, "-m", "trainer_node", "up", "--runs-dir", str(folder), "--run-id", RUN_ID]
    command += ["--steps", str(steps), *(word for setting in SETTINGS for word in ("--set", setting))]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HPT_")}
    process = subprocess.Popen(command, env=environment | {"HPT_PAGE_TOKEN": TOKEN})
    try:
        address, deadline = folder / RUN_ID / "page.address", time.monotonic() + START_SECONDS
        while not address.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the run did not start; its error is above")
            time.sleep(0.2)
        yield address.read_text(encoding="utf-8").strip()
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(STOP_SECONDS)


def wait_for_step(url: str, step: int) -> dict[str, Any]:
    """Poll the snapshot until this step; the snapshot."""
    deadline = time.monotonic() + RUN_SECONDS
    while True:
        with urllib.request.urlopen(f"{url}/api/snapshot", timeout=10) as answer:
            snapshot: dict[str, Any] = json.load(answer)
        if (snapshot["progress"]["step"] or 0) >= step:
            return snapshot
        if time.monotonic() > deadline:
            raise SystemExit(f"step {step} did not come in {RUN_SECONDS:.0f} s")
        time.sleep(0.2)


def ask_for_a_checkpoint(url: str) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}", "Origin": url, "Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/api/actions/checkpoint", b"{}", headers, method="POST")
    urllib.request.urlopen(request, timeout=10).close()


def make_smaller(picture: Path) -> None:
    """To 256 colours: a quarter of the bytes, and nobody sees it. Pillow comes with matplotlib."""
    with Image.open(picture) as found:
        reduced = found.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    reduced.save(picture, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--into", type=Path, default=Path("docs"), help="folder of the pictures")
    parser.add_argument("--steps", type=int, default=1200)
    options = parser.parse_args()
    program = chromium_path()
    if program is None:
        raise SystemExit("chromium is not installed: apt install chromium")
    with (
        tempfile.TemporaryDirectory() as folder,
        running(Path(folder), options.steps) as url,
        Browser(program) as browser,
    ):
        wait_for_step(url, options.steps // 2)
        ask_for_a_checkpoint(url)
        wait_for_step(url, int(SHARE_SEEN * options.steps))
        for name, width, is_dark in LOOKS:
            browser.show(width=width, height=900, dark=is_dark)
            browser.open("about:blank")
            browser.open(url)
            wait_for_charts(browser)
            browser.screenshot(options.into / name)
            make_smaller(options.into / name)
            print(options.into / name, flush=True)
        for complaint in browser.complaints:
            print(f"the page complains: {complaint}")


if __name__ == "__main__":
    main()
