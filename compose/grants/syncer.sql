-- What the syncer of one key provider may do in the store. `skipctl db provision` puts the account and the database in.
-- It cannot read a key record or a wrapping key, and cannot change tables.
GRANT SELECT ON :database.alembic_version TO :account;
GRANT SELECT, UPDATE, DELETE ON :database.outbox TO :account;
GRANT SELECT, INSERT ON :database.inbox TO :account;
GRANT SELECT, INSERT, UPDATE ON :database.peers TO :account;
GRANT SELECT, INSERT, UPDATE ON :database.announcements TO :account;
GRANT SELECT, INSERT, UPDATE ON :database.pinned_identities TO :account;
GRANT SELECT, INSERT, UPDATE ON :database.processes TO :account;
GRANT SELECT, INSERT, UPDATE ON :database.leases TO :account;
