"""TLS in the api process: contexts, pre-shared keys, certificates, callers, and the reasons of refused handshakes.

Only ``openssl`` calls OpenSSL below Python's ssl module. ``self_check`` first tries this in a child process.
"""
