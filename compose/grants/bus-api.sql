-- What the api may do besides where keys travel over a bus: place, confirm and withdraw keys, keep stock. With api.sql.
GRANT SELECT, UPDATE, DELETE ON :database.outbox TO :account;
GRANT SELECT, INSERT, DELETE ON :database.stock TO :account;
GRANT SELECT, DELETE ON :database.stock_held TO :account;
GRANT SELECT ON :database.bus_announcements TO :account;
GRANT SELECT, INSERT, UPDATE ON :database.leases TO :account;
