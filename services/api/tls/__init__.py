"""TLS in the api process: contexts, pre-shared keys, certificates, who is calling, and why a handshake was refused.

Only ``openssl`` reaches below Python's ssl module; ``self_check`` proves first, in a process of its own, that it may.
"""
