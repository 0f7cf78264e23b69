"""Gives out stock: keys that are at the peer already, claimed in one local transaction, without a round trip to it.

The row is deleted, and that is committed together with the news for the peer, before the answer leaves. A copy that
does not open is dropped and withdrawn at the peer, and its caller is served by the next one or on demand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from skipbus.services.api.claiming import Opener
from skipbus.services.api.commit_tokens import CommitTokens
from skipbus.services.api.links import IssuedKey
from skipbus.services.api.links.placing import withdrawn_row
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.sealing import KeyRecord
from skipbus.shared.errors import SealBroken, SkipbusError
from skipbus.shared.logs import get_logger
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.envelopes import EnvelopeType
from skipbus.shared.store.keys import end_without_change
from skipbus.shared.store.packets import OutboxRow
from skipbus.shared.store.steps import Steps
from skipbus.shared.store.stock_steps import claim_stock_steps, commit_given_out

_log = get_logger("stock")


@dataclass(frozen=True, slots=True)
class StockRequest:
    """A key of the default size that waits at the KP ``target_id``."""

    target_id: str
    correlation_id: str


class StockOpener(Opener):
    """Opens this KP's own copies: sealed by it to itself, each bound to the peer that it is kept for."""

    def open_copy(self, copy: KeyRecord, peer_id: str) -> bytes:
        """The key in a copy. Raises SealBroken."""
        wrapping_key = self._opened.get(copy.wrapping_key_id)
        if wrapping_key is None:
            raise SealBroken("the wrapping key of a key in stock is not in the store")
        return wrapping_key.open(copy, peer_id.encode())


def usable_until_ms(at_ms: int, key_ttl_seconds: int) -> int:
    """How long (UTC ms) a key must live to be given out of stock: the target shall have half of a lifetime left."""
    return at_ms + key_ttl_seconds * 500


@dataclass(slots=True)
class _Taken:
    """What one peer's stock gave."""

    copies: list[KeyRecord] = field(default_factory=list)
    issued: list[list[object]] = field(default_factory=list)
    broken: list[tuple[bytes, int, str]] = field(default_factory=list)


class StockClaimBatch:
    """One transaction that gives out several keys; None stands in the place of a request that found none."""

    def __init__(self, opener: StockOpener, key_ttl_seconds: int, requests: Sequence[StockRequest]) -> None:
        self._opener = opener
        self._key_ttl_seconds = key_ttl_seconds
        self._requests = requests
        self._tokens: CommitTokens[list[IssuedKey | None]] = CommitTokens()

    def run(self) -> Steps[Sequence[IssuedKey | SkipbusError | None]]:
        """Claims, opens, deletes and commits."""
        at_ms = now_ms()
        stock = yield from self._claim(at_ms)
        broken = yield from self._opener.load({copy.wrapping_key_id for of_peer in stock.values() for copy in of_peer})
        taken = {peer_id: _Taken() for peer_id in stock}
        answers = [self._take_one(r, stock[r.target_id], broken, taken[r.target_id]) for r in self._requests]
        copies = [copy for of_peer in taken.values() for copy in of_peer.copies]
        if copies:
            yield from commit_given_out(copies, self._rows(taken, at_ms, self._tokens.new(answers)))
        else:
            yield from end_without_change()
        return answers

    def committed(self) -> Steps[Sequence[IssuedKey | SkipbusError | None] | None]:
        """The answers of an interrupted commit that happened: its token then stands in the outbox."""
        return self._tokens.committed()

    def _claim(self, at_ms: int) -> Steps[dict[str, list[KeyRecord]]]:
        usable_ms = usable_until_ms(at_ms, self._key_ttl_seconds)
        stock: dict[str, list[KeyRecord]] = {}
        for peer_id, count in Counter(request.target_id for request in self._requests).items():
            # The last one is handed out first: popping costs nothing there, and the order among these few is no matter.
            stock[peer_id] = yield from claim_stock_steps(self._opener.local_id, peer_id, usable_ms, count)
        return stock

    def _take_one(
        self, request: StockRequest, stock: list[KeyRecord], broken: Mapping[bytes, SealBroken], taken: _Taken
    ) -> IssuedKey | None:
        while stock:
            copy = stock.pop()
            taken.copies.append(copy)
            try:
                key = self._open(copy, request.target_id, broken)
            except SealBroken as error:
                _log.error("key in stock does not open", peer=request.target_id, reason=str(error))
                taken.broken.append((copy.key_id, copy.expires_ms, request.correlation_id))
                continue
            taken.issued.append([copy.key_id, copy.size_bits, copy.expires_ms, request.correlation_id])
            return IssuedKey(copy.key_id.hex(), key.hex())
        return None

    def _open(self, copy: KeyRecord, peer_id: str, broken: Mapping[bytes, SealBroken]) -> bytes:
        if copy.wrapping_key_id in broken:
            raise SealBroken(str(broken[copy.wrapping_key_id]))
        return self._opener.open_copy(copy, peer_id)

    def _rows(self, taken: dict[str, _Taken], at_ms: int, token: bytes) -> list[OutboxRow]:
        local_id, rows = self._opener.local_id, list[OutboxRow]()
        for peer_id, of_peer in taken.items():
            if of_peer.broken:
                rows.append(withdrawn_row(local_id, peer_id, of_peer.broken, at_ms))
            if of_peer.issued:
                kind, payload = EnvelopeType.KEY_ISSUED.value, encoding.pack(of_peer.issued)
                first = None if any(row.token for row in rows) else token
                rows.append(OutboxRow(local_id, peer_id, kind, payload, len(of_peer.issued), at_ms, first))
        return rows
