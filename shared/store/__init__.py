"""The store: its schema and migrations, how to connect, and every SQL statement of skipbus.

One module of queries for each table, one function for one question: ``insert_``, ``fetch_``, ``claim_`` (locks what it
fetches), ``update_``, ``upsert_``, ``delete_``, each with the index that it uses. Statements are SQLAlchemy Core and
the driver binds the values. Functions block, and run inside a transaction of their caller.
"""
