-- What the api of one key provider may do in the store. `skipctl db provision` puts the account and the database in.
-- It can read the outbox: keyIds and peers, and sealed keys only where bus-api.sql applies too. It cannot change tables.
GRANT SELECT ON :database.alembic_version TO :account;
GRANT SELECT, INSERT, DELETE ON :database.key_records TO :account;
GRANT SELECT, INSERT, UPDATE ON :database.wrapping_keys TO :account;
GRANT SELECT, INSERT ON :database.outbox TO :account;
GRANT SELECT ON :database.announcements TO :account;
GRANT SELECT, INSERT, UPDATE ON :database.pinned_identities TO :account;
GRANT SELECT ON :database.peers TO :account;
GRANT SELECT ON :database.processes TO :account;
