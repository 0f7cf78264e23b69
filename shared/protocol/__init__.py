"""What key providers and encryptors say: ids, keys, envelopes, announcements, and their bytes. Pure rules."""
