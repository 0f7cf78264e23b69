"""Facts about the documentation: links lead somewhere, every page is found, and what it quotes is in the code."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from skipbus.shared.settings.model import known_names

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = sorted(
    [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS.rglob("*.md"), *(ROOT / "compose").rglob("*.md")]
)
CODE = sorted(path for folder in ("services", "shared", "skipctl") for path in (ROOT / folder).rglob("*.py"))
MAX_LINE = 120
MAX_README_LINES = 170

FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[(?:[^\]]|\](?=`))*\]\(([^)\s]+)\)")
VARIABLE = re.compile(r"\b(?:SKIP|MYSQL|RABBITMQ)_[A-Z0-9_]*[A-Z0-9](?![A-Z0-9_*])")
# Of other programs; of the earlier server, and ignored; a misspelling that the changelog shows.
OTHER_VARIABLES = {"MYSQL_ROOT_PASSWORD", "SKIP_TLL_SECONDS"}
METRIC = re.compile(r"\bskipbus_[a-z_]+\b")
METRIC_CLASSES = {"Counter": "_total", "CounterMetricFamily": "_total", "Gauge": "", "Histogram": ""}
# Placeholders of an f-string, in what is read from the code.
HOLE = "\0"


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """The files in this repository that a page links to, each with its anchor or an empty text."""
    for target in LINK.findall(prose(page)):
        if not target.startswith(("https://", "http://", "mailto:")):
            path, _, anchor = target.partition("#")
            yield (page.parent / path).resolve() if path else page, anchor


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    dead = [
        f"{target.relative_to(ROOT)}#{anchor}"
        for target, anchor in links(page)
        if not target.exists() or (anchor and anchor not in anchors(target))
    ]
    assert dead == []


def test_every_page_is_reachable_from_the_readme() -> None:
    found, new = {README}, [README]
    while new:
        targets = {target for target, _ in links(new.pop()) if target.suffix == ".md" and target.exists()}
        new.extend(targets - found)
        found |= targets
    assert [page_name(page) for page in PAGES if page not in found] == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_lines_are_short_but_for_tables(page: Path) -> None:
    lines = enumerate(page.read_text().splitlines(), start=1)
    assert [number for number, line in lines if len(line) > MAX_LINE and not line.startswith("|")] == []


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= MAX_README_LINES


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_variable_that_a_page_names_exists(page: Path) -> None:
    assert set(VARIABLE.findall(page.read_text())) - OTHER_VARIABLES - _variables() == set()


def _variables() -> set[str]:
    return {*known_names(), *(f"SKIP_REMOTE_SYSTEM_ID_{number}" for number in (1, 2))}


def test_operations_lists_exactly_the_metrics_that_the_processes_have() -> None:
    listed = re.findall(r"^\| `(skipbus_\w+)` \|", (DOCS / "operations.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(_metrics())


@pytest.mark.parametrize("page", [README, *DOCS.glob("*.md")], ids=page_name)
def test_every_metric_that_a_page_names_exists(page: Path) -> None:
    assert set(METRIC.findall(prose(page))) - _metrics() <= {"skipbus_testkit"}


@functools.cache
def _metrics() -> frozenset[str]:
    """The names under which Prometheus gets what the code makes."""
    found = set()
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in METRIC_CLASSES:
                name = node.args[0] if node.args else None
                if isinstance(name, ast.Constant) and isinstance(name.value, str) and name.value.startswith("skipbus_"):
                    found.add(name.value + METRIC_CLASSES[node.func.id])
    return frozenset(found)


def _quoted(page: str, column: int, *, after: str = "") -> list[str]:
    """The sentences in backticks in a column of the tables of a page; one word is no sentence."""
    _, found, text = (DOCS / page).read_text().rpartition(after) if after else ("", "-", (DOCS / page).read_text())
    assert found, f"{page} has no {after}"
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    cells = [row[column] for row in rows if len(row) > column]
    return [sentence for cell in cells for sentence in re.findall(r"`([^`]+)`", cell) if " " in sentence]


@pytest.mark.parametrize(
    "sentence",
    sorted({*_quoted("troubleshooting.md", 0), *_quoted("http-api.md", 1, after="## Statuses and sentences")}),
)
def test_every_sentence_that_is_quoted_is_in_the_code(sentence: str) -> None:
    """A `…` stands for what varies."""
    parts = [part.strip() for part in sentence.split("…") if len(part.strip()) > 3]
    assert parts
    assert [part for part in parts if not _is_said(part)] == []


def _is_said(part: str) -> bool:
    said, patterns = _sentences()
    return any(part in text for text in said) or any(pattern.fullmatch(part) for pattern in patterns)


@functools.cache
def _sentences() -> tuple[list[str], list[re.Pattern[str]]]:
    """What the code can say; and patterns for what has something filled in."""
    said: list[str] = []
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                said.append("".join(str(p.value) if isinstance(p, ast.Constant) else HOLE for p in node.values))
    filled = [text for text in said if HOLE in text and len(text.replace(HOLE, "")) > 15]
    return said, [re.compile(".+".join(map(re.escape, text.split(HOLE)))) for text in filled]


def test_the_two_places_that_quote_sentences_quote_some() -> None:
    assert len(_quoted("troubleshooting.md", 0)) > 20
    assert len(_quoted("http-api.md", 1, after="## Statuses and sentences")) > 15


@functools.cache
def openapi() -> dict[str, Any]:
    document = yaml.safe_load((DOCS / "openapi.yaml").read_text())
    assert isinstance(document, dict)
    return document


def test_openapi_describes_the_paths_of_the_http_api_page() -> None:
    described = {(m.upper(), path) for path, item in openapi()["paths"].items() for m in item}
    listed = re.findall(r"^\| \[`(GET|HEAD|POST) (\S+)`\]", (DOCS / "http-api.md").read_text(), re.MULTILINE)
    assert described == set(listed)


def test_openapi_refers_only_to_what_it_has_and_has_only_what_it_refers_to() -> None:
    wanted = set(_references(openapi()))
    parts = openapi()["components"]
    assert wanted == {f"#/components/{kind}/{name}" for kind, items in parts.items() for name in items}


def _references(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)
