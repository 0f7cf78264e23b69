"""Keys over keys: identity, epochs, seals, and the keyring with its pins. No I/O but in `keyring` and `pins`."""
