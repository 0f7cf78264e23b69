"""How a batch finds out, when its connection broke during a commit, whether the commit happened after all.

Each run of a batch commits a token of its own with its events. An interrupted commit may land late, when the next run
is on its way, so the tokens of all runs are kept, each with that run's answers. Leaves to others: placing on demand,
whose tokens are its outbox rows' own (``placing``), and issuing, whose keys prove it themselves (``issuing``).
"""

from __future__ import annotations

import secrets
from typing import Generic, TypeVar

from skipbus.shared.store.keys import fetch_commit_token
from skipbus.shared.store.steps import Steps

Answers = TypeVar("Answers")


class CommitTokens(Generic[Answers]):
    """Of one batch."""

    def __init__(self) -> None:
        self._runs: list[tuple[bytes, Answers]] = []

    def new(self, answers: Answers) -> bytes:
        """The token for a run that, once it is committed, has these answers."""
        token = secrets.token_bytes(16)
        self._runs.append((token, answers))
        return token

    def committed(self) -> Steps[Answers | None]:
        """The answers of an interrupted commit that happened: its token then stands in the outbox."""
        for token, answers in self._runs:
            if (yield from fetch_commit_token(token)):
                return answers
        return None
