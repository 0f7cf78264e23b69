"""Figures and the table that they end in. Pure: no clock, no I/O."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

_HEADINGS = ("item", "measured", "min / median / max", "compared with", "its median", "ratio", "target", "met")


@dataclass(frozen=True)
class Figure:
    """One thing, measured several times in one unit."""

    name: str
    samples: Sequence[float]
    unit: str

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def spread(self) -> str:
        """Least, median and greatest, or the only value."""
        values = (min(self.samples), self.median, max(self.samples))
        shown = " / ".join(number(value) for value in (values if len(self.samples) > 1 else values[:1]))
        return f"{shown} {self.unit}"

    def short(self) -> str:
        return f"{number(self.median)} {self.unit}"


@dataclass(frozen=True)
class Target:
    """A bound, and what is held against it: the ratio, unless `value` is given."""

    kind: Literal["at least", "at most"]
    bound: float
    unit: str = ""
    value: float | None = None

    def is_met(self, ratio: float | None) -> bool:
        value = ratio if self.value is None else self.value
        if value is None:
            raise ValueError("a target needs a ratio or a value")
        return value >= self.bound if self.kind == "at least" else value <= self.bound

    def __str__(self) -> str:
        sign = "≥" if self.kind == "at least" else "≤"
        return f"{sign} {self.bound:g} {self.unit}".rstrip()


@dataclass(frozen=True)
class Line:
    """One line of the table. Without a target it is printed for comparison and is neither met nor missed.

    The ratio is that of the medians, or the median of the ratios of samples that were taken `side_by_side`.
    """

    item: int
    figure: Figure
    against: Figure | None = None
    target: Target | None = None
    side_by_side: Sequence[float] = ()

    @property
    def ratio(self) -> float | None:
        if self.side_by_side:
            return statistics.median(self.side_by_side)
        return self.figure.median / self.against.median if self.against else None

    @property
    def met(self) -> bool | None:
        return self.target.is_met(self.ratio) if self.target else None

    def cells(self) -> tuple[str, ...]:
        return (
            str(self.item),
            self.figure.name,
            self.figure.spread(),
            self.against.name if self.against else "",
            self.against.short() if self.against else "",
            f"{self.ratio:.2f}" if self.ratio is not None else "",
            str(self.target) if self.target else "",
            {True: "yes", False: "NO", None: ""}[self.met],
        )


@dataclass(frozen=True)
class Finding:
    """What one item came to: its lines, and what is to be said beside them; `failed` when it has no lines."""

    lines: Sequence[Line]
    notes: Sequence[str] = ()
    failed: bool = False


def p99(values: Sequence[float]) -> float:
    """The value that one in a hundred is above."""
    return sorted(values)[max(0, -(-len(values) * 99 // 100) - 1)]


def number(value: float) -> str:
    """Three significant digits at least, thousands apart."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def plain_table(findings: Sequence[Finding]) -> str:
    """The table for a terminal, and the notes under it."""
    rows = [_HEADINGS, *_rows(findings)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    text = "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
    return text + "".join(f"\n{note}" for note in _notes(findings))


def markdown_table(findings: Sequence[Finding]) -> str:
    """The same for `docs/performance.md`."""
    rows = [_HEADINGS, tuple("---" for _ in _HEADINGS), *_rows(findings)]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return text + "\n" + "".join(f"\n- {note}" for note in _notes(findings))


def all_met(findings: Sequence[Finding]) -> bool:
    """Whether no target is missed and no item failed."""
    return not any(finding.failed for finding in findings) and all(
        line.met is not False for finding in findings for line in finding.lines
    )


def _rows(findings: Sequence[Finding]) -> list[tuple[str, ...]]:
    return [line.cells() for finding in findings for line in finding.lines]


def _notes(findings: Sequence[Finding]) -> list[str]:
    return [note for finding in findings for note in finding.notes]
