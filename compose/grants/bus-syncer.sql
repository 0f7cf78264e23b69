-- What the syncer may do besides where keys travel over a bus: carry sealed records and keep stock. With syncer.sql.
-- It can read key records then, and open none of them: what opens them is in the keyring, and only the api does it.
GRANT SELECT, INSERT, DELETE ON :database.key_records TO :account;
GRANT SELECT, INSERT, UPDATE ON :database.wrapping_keys TO :account;
GRANT INSERT ON :database.outbox TO :account;
GRANT DELETE ON :database.inbox TO :account;
GRANT SELECT, UPDATE, DELETE ON :database.stock TO :account;
GRANT SELECT, INSERT, DELETE ON :database.stock_held TO :account;
GRANT SELECT, INSERT ON :database.withdrawn_keys TO :account;
GRANT SELECT, INSERT, UPDATE, DELETE ON :database.bus_announcements TO :account;
