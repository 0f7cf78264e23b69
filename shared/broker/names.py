"""What exchanges, queues and routing keys of the bus are called. Pure; docs/protocol.md shows the picture.

A system id may hold characters that mean something in a routing key (``.``, ``#``, ``*``) or in a permission
pattern, or that clients refuse in a queue's name, so everything but letters, digits, ``_`` and ``-`` is written
as ``:XX``. Different ids always get different names, because ``:`` itself is written so too.
"""

from __future__ import annotations

import re

ENVELOPES = "skipbus.envelopes"
DEAD_LETTERS = "skipbus.dead"
NOTIFICATIONS = "skipbus.notifications"

_PLAIN = re.compile(r"[^A-Za-z0-9_-]")


def encode_id(system_id: str) -> str:
    """The id as it stands in names: ``KP Bob.1`` is ``KP:20Bob:2E1``."""
    return _PLAIN.sub(lambda match: f":{ord(match[0]):02X}", system_id)


def routing_key(system_id: str) -> str:
    """Where envelopes go that must arrive: they wait there for a KP that is down."""
    return f"kp.{encode_id(system_id)}"


def live_routing_key(system_id: str) -> str:
    """Where envelopes go that mean something only to a KP that listens now: heartbeats, capabilities."""
    return f"live.{encode_id(system_id)}"


def queue_name(system_id: str) -> str:
    """The KP's quorum queue."""
    return f"skipbus.kp.{encode_id(system_id)}"


def live_queue_name(system_id: str) -> str:
    """The KP's queue for what is not kept; it exists only while the KP listens."""
    return f"skipbus.live.{encode_id(system_id)}"


def dead_queue_name(system_id: str) -> str:
    """The queue of the envelopes that the KP rejected, for an operator to read."""
    return f"skipbus.dead.{encode_id(system_id)}"


def notification_routing_key(system_id: str, kind: str) -> str:
    """Where the KP's own processes notify each other that something of this kind changed."""
    return f"{encode_id(system_id)}.{kind}"


def notification_queue_name(system_id: str, process: str) -> str:
    """One process's queue for notifications; it goes with the process's connection."""
    return f"skipbus.notifications.{encode_id(system_id)}.{process}"
