"""`python -m tests.fuzz TARGET [--seconds N] [--corpus DIR]`: one target under atheris, guided by coverage.

Ends with code 0 after the time, or with the input that broke a law as `crash-...` in the corpus folder:
put its bytes into tests/test_hostile_bytes.py. Needs the extra `fuzz`; no part of `make test`.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import click

LONGEST_INPUT_BYTES = 4096
SLOWEST_SECONDS = 20  # of one input; a machine that is frozen for a while is no slow input
MOST_MEMORY_MIB = 2048
# Python that is ours or parses for us; what is not listed is not instrumented, torch least of all.
INSTRUMENTED = ["common", "trainer_node.weight_forecast", "monitor_node", "tomllib", "starlette", "json"]


@click.command()
@click.argument("target")
@click.option("--seconds", default=120, show_default=True, help="Time to run; 0 = until stopped.")
@click.option("--corpus", type=click.Path(path_type=Path), help="Inputs found so far; kept and added to.")
def main(target: str, seconds: int, corpus: Path | None) -> None:
    try:
        import atheris
    except ImportError:
        raise click.ClickException("atheris is not installed: pip install -e '.[fuzz]'") from None
    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.fuzz import targets

        if target == "forecaster":
            importlib.import_module("trainer_node.weight_forecast")  # with torch: seconds
    if target not in targets.TARGETS:
        raise click.UsageError(f"no target {target!r}; there are {', '.join(targets.TARGETS)}")
    folder = corpus or Path("/tmp/hpt-fuzz") / target
    folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(targets.SEEDS[target]):
        (folder / f"seed-{number}").write_bytes(seed)
    options = {
        "max_total_time": seconds, "max_len": LONGEST_INPUT_BYTES, "timeout": SLOWEST_SECONDS,
        "rss_limit_mb": MOST_MEMORY_MIB, "artifact_prefix": f"{folder}/", "print_final_stats": 1,
    }  # fmt: skip
    atheris.Setup(
        [sys.argv[0], str(folder), *(f"-{k}={v}" for k, v in options.items())], targets.TARGETS[target]
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
