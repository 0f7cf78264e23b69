"""The two envelopes that an encryptor waits for, in a packet or two each: a key on demand, and its acknowledgement.

What is out of the ordinary (an envelope or a key that is known, a wrapping key that is not, stock, a store that is
away) is left to ``effects``, which does the same for everything, one statement after another.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from skipbus.services.syncer.examination import Accepted
from skipbus.services.syncer.key_effects import Aftermath, KnownWrappingKeys
from skipbus.services.syncer.payloads import Acknowledgement
from skipbus.services.syncer.placed_keys import PlacedKeys
from skipbus.shared.config import MySqlSettings
from skipbus.shared.errors import StoreRefused, StoreUnavailable
from skipbus.shared.logs import get_logger
from skipbus.shared.protocol.envelopes import Header
from skipbus.shared.store import relaying
from skipbus.shared.store.keys import end_without_change
from skipbus.shared.store.loop_steps import LoopSteps
from skipbus.shared.store.messages import EnvelopeRow
from skipbus.shared.store.placing import KEY_PLACED, KEY_STOCKED
from skipbus.shared.store.steps import Steps

# Keys of one envelope, and envelopes of one acknowledgement. More than that is bulk, which has bounds of its own.
MAX_AT_ONCE = 32

RowsOf = Callable[[str, int], Sequence[EnvelopeRow]]

_log = get_logger("at once")


class AtOnce:
    """Of one KP and one event loop, for one envelope at a time. ``known`` is shared with ``effects``."""

    def __init__(
        self,
        mysql: MySqlSettings,
        local_id: str,
        bus_ids: Collection[str],
        known: KnownWrappingKeys,
        rows_of: RowsOf,
    ) -> None:
        """``rows_of`` spares the question for the rows of a peer's envelope, where they are known."""
        self._local_id = local_id
        self._bus_ids = frozenset(bus_ids)
        self._known = known
        self._rows_of = rows_of
        self._runner = LoopSteps(mysql)

    async def apply(self, accepted: Accepted, now_ms: int, meanwhile: Callable[[], None]) -> Aftermath | None:
        """Commits what the envelope does; None where it has not done so, or cannot say whether it has. Never raises.

        Then it is still to be done, which does no harm where it is done. ``meanwhile`` is done while the store commits.
        """
        steps = self._steps(accepted, now_ms, meanwhile)
        if steps is None:
            return None
        try:
            return await self._runner.run(steps)
        except (StoreUnavailable, StoreRefused) as error:
            _log.debug("left to the ordinary way", type=accepted.header.type.value, reason=str(error))
            return None

    def close(self) -> None:
        """Gives its connection back."""
        self._runner.close()

    def _steps(self, accepted: Accepted, now_ms: int, meanwhile: Callable[[], None]) -> Steps[Aftermath | None] | None:
        header = accepted.header
        match accepted.payload:
            case PlacedKeys(records) as placed if not placed.stock and len(records) <= MAX_AT_ONCE:
                return self._store(header, placed, now_ms, meanwhile)
            case Acknowledgement(numbers) if header.sender in self._bus_ids and len(numbers) <= MAX_AT_ONCE:
                return self._acknowledge(header.sender, sorted(set(numbers)))
            case _:
                return None

    def _store(
        self, header: Header, placed: PlacedKeys, now_ms: int, meanwhile: Callable[[], None]
    ) -> Steps[Aftermath | None]:
        if self._known.missing(placed.sealed_wrapping_keys(header)):
            return None
        records = placed.key_records(header)
        yield from relaying.commit_received(
            self._local_id, header.sender, header.number, records, now_ms, meanwhile=meanwhile
        )
        return Aftermath(arrived=[record.key_id for record in records])

    def _acknowledge(self, peer_id: str, numbers: Sequence[int]) -> Steps[Aftermath | None]:
        if not numbers:
            return None
        known = self._rows_of(peer_id, numbers[0]) if len(numbers) == 1 else ()
        rows = known or (yield from relaying.lock_envelope_rows(self._local_id, peer_id, numbers))
        if not rows or any(row.type == KEY_STOCKED for row in rows):
            yield from end_without_change()
            return None
        placed = [row for row in rows if row.type == KEY_PLACED]
        counts = {"issued": sum(row.items for row in placed)}
        yield from relaying.commit_acknowledged(
            self._local_id, peer_id, [row.id for row in rows], counts, unlocked_of=numbers[0] if known else None
        )
        return Aftermath(stored=[row.token for row in placed if row.token])
