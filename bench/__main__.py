"""`make bench`: measure, print one table, and end with 1 where a target is missed.

`--only 1,3` measures some of the items, `--quick` tries the bench out in a minute or two (its figures are not to
be quoted), `--markdown` prints the table as it stands in docs/performance.md.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from bench import machine
from bench.cpu import CpuMeter
from bench.items import (
    latency,
    live_keys,
    memory,
    sites_cut,
    sites_idle,
    sites_on_demand,
    sites_placing,
    sites_stock,
    throughput,
    tls,
    workers,
    zeroizing,
)
from bench.plan import FULL, QUICK, Plan
from bench.progress import tell
from bench.report import Finding, all_met, markdown_table, plain_table
from bench.stage import Stage
from sandbox.processes import SandboxError

_ITEMS: dict[int, tuple[str, Callable[[Stage, Plan], Finding]]] = {
    1: ("rates of one api process", throughput.measure),
    2: ("few and many live keys", live_keys.measure),
    3: ("latency of one connection", latency.measure),
    4: ("two api workers", workers.measure),
    5: ("zeroizing", zeroizing.measure),
    6: ("memory", memory.measure),
    7: ("TLS", tls.measure),
    8: ("two sites: a key on demand", sites_on_demand.measure),
    9: ("two sites: keys from stock", sites_stock.measure),
    10: ("two sites: placing keys at the peer", sites_placing.measure),
    11: ("two sites: the line is cut", sites_cut.measure),
    12: ("two sites: idle, and many peers", sites_idle.measure),
}
# What other programs may take of the processor before a figure is said to be disturbed.
_QUIET_CORES = 0.1
# /tmp is in memory on many machines; this is not meant to be.
_DISK = Path("/var/tmp")  # noqa: S108 - only the parent of a folder with a random name


def main(argv: Sequence[str]) -> int:
    """Exit code 0 when no target is missed, 1 when one is or the bench failed, 2 for wrong usage."""
    arguments = _parse(argv)
    signal.signal(signal.SIGTERM, _stop)
    try:
        findings = _run(arguments.only, QUICK if arguments.quick else FULL, arguments.markdown)
    except SandboxError as error:
        tell(f"bench failed: {error}")
        return 1
    except KeyboardInterrupt:
        tell("stopped; nothing is left behind")
        return 1
    return 0 if all_met(findings) else 1


def _run(items: Sequence[int], plan: Plan, markdown: bool) -> list[Finding]:
    with tempfile.TemporaryDirectory(prefix="skipbus-bench-", dir=_folder()) as root:
        stage = Stage(Path(root))
        about = machine.describe(stage.mysql.program)
        try:
            tell("starting servers and key providers")
            stage.start()
            findings = [_measure(item, stage, plan) for item in items]
        finally:
            stage.stop()
    show = _markdown if markdown else _plain
    print(show(about, findings))
    if plan is QUICK:
        tell("\na quick run: it shows that the bench works, its figures are not to be quoted")
    return findings


def _measure(item: int, stage: Stage, plan: Plan) -> Finding:
    name, measure = _ITEMS[item]
    tell(f"item {item}: {name}")
    started = time.monotonic()
    stage.clear()
    # Everything that runs for the bench is its child.
    with CpuMeter(bench=os.getpid()) as meter:
        try:
            finding = measure(stage, plan)
        except SandboxError as error:
            tell(f"  failed: {error}{stage.reasons()}")
            finding = Finding([], [f"item {item} failed: {error}"], failed=True)
    tell(f"  took {time.monotonic() - started:.0f} s")
    if meter.others() < _QUIET_CORES:
        return finding
    disturbed = f"item {item}: other programs kept {meter.others():.2f} cores busy: measure again on a quiet machine"
    return Finding(finding.lines, [*finding.notes, disturbed])


def _plain(about: Sequence[tuple[str, str]], findings: Sequence[Finding]) -> str:
    width = max(len(what) for what, _ in about)
    head = "\n".join(f"{what:<{width}}  {value}" for what, value in about)
    return f"\n{head}\n\n{plain_table(findings)}"


def _markdown(about: Sequence[tuple[str, str]], findings: Sequence[Finding]) -> str:
    head = "\n".join(f"- {what}: {value}" for what, value in about)
    return f"{head}\n\n{markdown_table(findings)}"


def _folder() -> str | None:
    """Where the stage's folder is made: what TMPDIR says, else a folder that is on a disk."""
    return str(_DISK) if _DISK.is_dir() and tempfile.gettempdir() == "/tmp" else None  # noqa: S108 - compared only


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", type=_items, default=sorted(_ITEMS), metavar="1,3", help="some items only")
    parser.add_argument("--quick", action="store_true", help="a short run, to try the bench out")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    return parser.parse_args(argv)


def _items(text: str) -> list[int]:
    try:
        items = sorted({int(part) for part in text.split(",")})
    except ValueError:
        items = []
    if not items or not set(items) <= _ITEMS.keys():
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of items from 1 to {len(_ITEMS)}")
    return items


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
