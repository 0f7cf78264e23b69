"""What the three processes share: rules without I/O, and the doors to the store, the bus and the keyring."""
