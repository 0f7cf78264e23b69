"""Every SQL statement of skipbus: one module for each table, one function for each question, with the index it uses.

Statements are SQLAlchemy Core and built once; the driver binds the values. Verbs: ``insert_``, ``fetch_``, ``claim_``
(locks rows), ``update_``, ``delete_``. Transactions are the callers'. ``expiry`` is what the janitor deletes from
several tables, ``listed`` deletes by a list, ``engine`` makes connections, ``migrate`` the schema, ``election`` elects
one of several processes.
"""
