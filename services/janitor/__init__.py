"""The process that zeroizes. It may delete key records and make and destroy epochs; it opens no key."""
