"""``skipbus-conformance URL URL``: two SKIP key providers against draft-cisco-skip-02, one line a clause.

It needs no pre-shared key and nothing of skipbus at the other side. It takes keys from the key providers, and leaves a
few that nobody fetches. Exit code 0 where all MUSTs hold (with --strict: the SHOULDs too), 1 where one does not, 2 for
a wrong argument or a key provider that is not reached.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from skipbus_testkit.clauses import CLAUSES, Clause, NotApplicable, Party, Unusable
from skipbus_testkit.client import Client, client_context

Verdict = Literal["pass", "FAIL", "warn", "skip"]


@dataclass(frozen=True)
class Result:
    """What became of one clause; ``seen`` says what was seen where it does not hold."""

    clause: Clause
    verdict: Verdict
    seen: str = ""

    @property
    def line(self) -> str:
        """As it is printed."""
        text = f"{self.verdict}  {self.clause.strength:<6}  {self.clause.section:<12}  {self.clause.text}"
        return f"{text}: {self.seen}" if self.seen else text


def check(first: Party, second: Party) -> Iterator[Result]:
    """All clauses, put to both key providers each."""
    for clause in CLAUSES:
        yield _worst([_one(clause, first, second), _one(clause, second, first)])


def _one(clause: Clause, a: Party, b: Party) -> Result:
    try:
        fault = clause.check(a, b)
    except NotApplicable as error:
        return Result(clause, "skip", f"{a.name}: {error}")
    except (Unusable, OSError, KeyError, TypeError) as error:
        fault = str(error) if isinstance(error, (Unusable, OSError)) else f"the answer has not the form ({error!r})"
    if fault is None:
        return Result(clause, "pass")
    return Result(clause, "FAIL" if clause.strength == "MUST" else "warn", f"{a.name}: {fault}")


def _worst(results: list[Result]) -> Result:
    order: list[Verdict] = ["FAIL", "warn", "skip", "pass"]
    return min(results, key=lambda result: order.index(result.verdict))


def main(argv: Sequence[str] | None = None) -> int:
    """Console script ``skipbus-conformance``."""
    arguments = _parser().parse_args(argv)
    try:
        parties = [_party(arguments, number) for number in (0, 1)]
        for party in parties:
            party.capabilities()
    except OSError as error:
        sys.stderr.write(f"skipbus-conformance: {error}\n")
        return 2
    results = []
    for result in check(*parties):
        print(result.line, flush=True)
        results.append(result)
    counts = {
        verdict: sum(result.verdict == verdict for result in results) for verdict in ("pass", "FAIL", "warn", "skip")
    }
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return 1 if counts["FAIL"] or (arguments.strict and counts["warn"]) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="skipbus-conformance", description="Check two SKIP key providers against draft-cisco-skip-02."
    )
    parser.add_argument("urls", nargs=2, metavar="URL", help="https://host:port of a key provider; two that share keys")
    for option, meaning in (
        ("--ca", "authorities in PEM (default: the system's)"),
        ("--cert", "a client certificate in PEM"),
        ("--key", "its private key in PEM"),
    ):
        parser.add_argument(option, action="append", default=[], help=f"{meaning}; twice for one each")
    parser.add_argument("--insecure", action="store_true", help="do not check the key providers' certificates")
    parser.add_argument("--timeout", type=float, default=15.0, metavar="SECONDS", help="for one answer (default 15)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 where a SHOULD does not hold")
    return parser


def _party(arguments: argparse.Namespace, number: int) -> Party:
    url = arguments.urls[number].rstrip("/")
    ca, cert, key = (_nth(getattr(arguments, name), number) for name in ("ca", "cert", "key"))
    context = client_context(ca, cert, key, verify=not arguments.insecure) if url.startswith("https:") else None
    return Party(url, Client(url, context, arguments.timeout))


def _nth(values: list[str], number: int) -> str | None:
    return values[min(number, len(values) - 1)] if values else None


if __name__ == "__main__":
    sys.exit(main())
