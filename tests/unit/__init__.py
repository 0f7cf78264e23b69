"""Rules, with a fake clock and no servers."""
