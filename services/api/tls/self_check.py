"""Tries pre-shared keys in a child process first, because a wrong pointer would crash the interpreter.

The child checks the pointer to OpenSSL's context and then runs whole handshakes in memory, TLS 1.2 and TLS 1.3 with
``TLS_AES_256_GCM_SHA384``, with the code that serves clients. If the child fails, TLS 1.3 with pre-shared keys is off.
TLS 1.2 goes on by the standard library if it can (Python 3.13), and certificates in any case.

``python -m skipbus.services.api.tls.self_check`` is the child; it prints what is wrong and exits with 1.
"""

from __future__ import annotations

import ctypes
import secrets
import ssl
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import skipbus

_NAME = b"self-check"
_TIMEOUT_SECONDS = 30.0
# Where `-m skipbus` finds the code that runs here, installed or not.
_HOME = Path(skipbus.__file__).parents[1]


@dataclass(frozen=True)
class PskModes:
    """How pre-shared keys are served: ``native`` is both versions, ``standard`` TLS 1.2 only; ``fault`` says why."""

    native: bool
    standard: bool
    fault: str | None

    @property
    def any(self) -> bool:
        """Whether pre-shared keys are served at all."""
        return self.native or self.standard


def find_psk_modes() -> PskModes:
    """Runs the child process; takes about 0.2 s."""
    fault = _ask_child()
    if fault is None:
        return PskModes(native=True, standard=False, fault=None)
    standard = hasattr(ssl.SSLContext, "set_psk_server_callback")
    what = "TLS 1.3 with pre-shared keys is off" if standard else "pre-shared keys are off"
    return PskModes(native=False, standard=standard, fault=f"{what}: {fault}")


def _ask_child() -> str | None:
    command = [sys.executable, "-m", "skipbus.services.api.tls.self_check"]
    try:
        result = subprocess.run(  # noqa: S603 -- our own interpreter
            command, cwd=_HOME, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the self-check could not be run ({type(error).__name__})"
    if result.returncode == 0:
        return None
    said = result.stdout.strip().splitlines()
    return said[-1] if said else f"the self-check ended with {result.returncode}"


def main() -> int:
    """The child: exit code 0 if everything works, else 1 and a sentence."""
    from skipbus.services.api.tls.openssl import Unsupported, prove_pointer  # noqa: PLC0415 -- only the child may load it

    try:
        prove_pointer()
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            _try_handshake(version)
    except (Unsupported, ssl.SSLError, AssertionError) as error:
        sys.stdout.write(f"{error}\n")
        return 1
    return 0


def _try_handshake(version: ssl.TLSVersion) -> None:
    from skipbus.services.api.tls import openssl, psk  # noqa: PLC0415 -- only the child may load it
    from skipbus.services.api.tls.callers import CallerBook  # noqa: PLC0415
    from skipbus.services.api.tls.handshake import TlsContext  # noqa: PLC0415
    from skipbus.shared.protocol.psk_file import PskKeys  # noqa: PLC0415

    identity, key = _NAME, secrets.token_bytes(48)
    context = TlsContext(ssl.PROTOCOL_TLS_SERVER)
    context.keys, context.callers = PskKeys({identity: key}), CallerBook({}, "self-check")
    context.set_ciphers("PSK-AES256-GCM-SHA384")
    psk.install(context)
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_context.check_hostname, client_context.verify_mode = False, ssl.CERT_NONE
    client_context.minimum_version = client_context.maximum_version = version
    client_context.set_ciphers("PSK-AES256-GCM-SHA384")
    kept = _offer_key(openssl, client_context, identity, key)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server)
    server = context.wrap_bio(to_server, to_client, server_side=True)
    _shake_hands(client.do_handshake, server.do_handshake)
    del kept
    cipher = server.cipher()
    if server.psk_identity != identity or cipher is None:
        raise openssl.Unsupported(f"{version.name} does not tell the identity")
    if not cipher[0].endswith("AES_256_GCM_SHA384") and cipher[0] != "PSK-AES256-GCM-SHA384":
        raise openssl.Unsupported(f"{version.name} took {cipher[0]}")


def _shake_hands(client: Callable[[], None], server: Callable[[], None]) -> None:
    done = [False, False]
    for _ in range(10):
        for index, step in enumerate((client, server)):
            if not done[index]:
                done[index] = _step(step)
        if all(done):
            return
    raise ssl.SSLError("the handshake did not end")


def _step(step: Callable[[], None]) -> bool:
    try:
        step()
    except ssl.SSLWantReadError:
        return False
    return True


def _offer_key(openssl: Any, context: ssl.SSLContext, identity: bytes, key: bytes) -> list[object]:  # noqa: ANN401 -- a module
    """Makes a client context offer the key in both versions. The returned objects must outlive it."""
    library, pointer = openssl.library(), openssl.context_pointer(context)
    identity_buffer = ctypes.create_string_buffer(identity)

    def use_session(ssl_pointer: int, _hash: int | None, start: Any, length: Any, session: Any) -> int:  # noqa: ANN401
        start[0] = ctypes.addressof(identity_buffer)
        length[0] = len(identity)
        session[0] = made = library.new_psk_session(ssl_pointer, key, b"\x13\x02")
        return int(made is not None and library.SSL_SESSION_set1_id_context(made, _NAME, len(_NAME)))

    def use_key(_ssl: int, _hint: bytes | None, identity_room: int, _most: int, key_room: int, _most_key: int) -> int:
        ctypes.memmove(identity_room, identity_buffer, len(identity) + 1)
        ctypes.memmove(key_room, key, len(key))
        return len(key)

    callbacks = openssl.UseSessionCallback(use_session), openssl.PskClientCallback(use_key)
    # OpenSSL's client requires the same id context for its context and its sessions.
    library.SSL_CTX_set_session_id_context(pointer, _NAME, len(_NAME))
    library.SSL_CTX_set_psk_use_session_callback(pointer, callbacks[0])
    library.SSL_CTX_set_psk_client_callback(pointer, callbacks[1])
    return [identity_buffer, *callbacks]


if __name__ == "__main__":
    sys.exit(main())
