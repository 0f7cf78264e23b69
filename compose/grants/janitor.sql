-- What the janitor of one key provider may do in the store. `skipctl db provision` puts the account and the database in.
-- It cannot add or change a key record, and cannot change tables.
GRANT SELECT ON :database.alembic_version TO :account;
GRANT SELECT, DELETE ON :database.key_records TO :account;
GRANT SELECT, DELETE ON :database.wrapping_keys TO :account;
GRANT SELECT, INSERT, DELETE ON :database.outbox TO :account;
GRANT SELECT, DELETE ON :database.inbox TO :account;
GRANT SELECT, INSERT, UPDATE ON :database.announcements TO :account;
GRANT SELECT, INSERT, UPDATE ON :database.pinned_identities TO :account;
GRANT SELECT, INSERT, UPDATE, DELETE ON :database.processes TO :account;
GRANT SELECT, DELETE ON :database.stock_held TO :account;
GRANT SELECT, DELETE ON :database.withdrawn_keys TO :account;
GRANT SELECT, INSERT, UPDATE ON :database.leases TO :account;
