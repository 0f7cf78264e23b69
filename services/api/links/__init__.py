"""How an api reaches a key provider: over one store that both use, or over a bus."""
