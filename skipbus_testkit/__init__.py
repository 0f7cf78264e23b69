"""A testkit for people who test encryptors: two real key providers in containers, and faults on demand.

    with SkipPair() as pair:
        print(pair.alice.https_url, pair.alice.psk_identity)

It also has a pytest plugin (``skipbus_testkit.plugin``) and ``skipbus-conformance``, which checks any SKIP key
provider. The distribution ``skipbus-testkit`` needs nothing of the server, which runs in its image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from skipbus_testkit.client import Answer
    from skipbus_testkit.pair import Exchanged, SkipPair
    from skipbus_testkit.provider import KeyProvider, RecordedRequest

__all__ = ["Answer", "Exchanged", "KeyProvider", "RecordedRequest", "SkipPair"]

_HOMES = {
    "Answer": "client",
    "Exchanged": "pair",
    "SkipPair": "pair",
    "KeyProvider": "provider",
    "RecordedRequest": "provider",
}


def __getattr__(name: str) -> object:
    # The plugin and the conformance check load this package and do not need testcontainers.
    from importlib import import_module  # noqa: PLC0415

    if name not in _HOMES:
        raise AttributeError(name)
    return getattr(import_module(f"skipbus_testkit.{_HOMES[name]}"), name)
