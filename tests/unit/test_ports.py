"""Ports of processes that take some at the same time."""

from __future__ import annotations

import pytest

from sandbox.ports import PORT_SHARE, free_port


def test_processes_with_shares_of_their_own_never_take_the_same_port(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for share in ("0/3", "1/3", "2/3"):
        monkeypatch.setenv(PORT_SHARE, share)
        taken.append({free_port() % 3 for _ in range(50)})
    assert [len(remainders) for remainders in taken] == [1, 1, 1]
    assert len(set().union(*taken)) == 3


def test_without_a_share_every_port_may_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PORT_SHARE, raising=False)
    assert {free_port() % 3 for _ in range(100)} == {0, 1, 2}
