"""Every SQL statement of skipbus, one function per question, each with the index that it uses.

``keys`` is the api's hot path on raw PyMySQL connections; ``messages`` is outbox and inbox, ``peers`` what
is known of other KPs, ``expiry`` what the janitor deletes, ``processes`` signs of life, all on SQLAlchemy Core.
Over a bus link ``placing`` and ``stock`` are the source's api, on raw connections too, ``stock`` and
``wrapping_keys`` its syncer, ``received`` the target's; what they put together themselves goes through ``packets``.
Verbs: ``insert_``, ``fetch_``, ``claim_``, ``update_``, ``delete_expired_``. Transactions are the callers', except in
``keys``, ``placing`` and ``stock``, where a whole transaction is one round trip.
"""
