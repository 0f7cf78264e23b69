"""Functions that Python's ssl module does not offer, called through ctypes in the same OpenSSL.

Owns the prototypes, the way from an ``SSLContext`` to its ``SSL_CTX``, and the check that this way is right. The
pointer is the first field of CPython's context object. ``self_check`` tries everything in a child process first, so
that an interpreter with another layout costs one mode and not the service.
"""

from __future__ import annotations

import _ssl
import ctypes
import ssl
import sys
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_long, c_size_t, c_uint, c_uint64, c_ulong, c_void_p
from functools import cache
from typing import Any

ClientHelloCallback = CFUNCTYPE(c_int, c_void_p, POINTER(c_int), c_void_p)
PskServerCallback = CFUNCTYPE(c_uint, c_void_p, c_char_p, c_void_p, c_uint)
FindSessionCallback = CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t, POINTER(c_void_p))
UseSessionCallback = CFUNCTYPE(c_int, c_void_p, c_void_p, POINTER(c_void_p), POINTER(c_size_t), POINTER(c_void_p))
PskClientCallback = CFUNCTYPE(c_uint, c_void_p, c_char_p, c_void_p, c_uint, c_void_p, c_uint)

_SET_SESSION_CACHE_MODE = 44
_SET_GROUPS_LIST = 92
_SET_SIGALGS_LIST = 98
TLS_1_3 = 0x0304
_PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ERR_clear_error": (None, ()),
    "ERR_peek_error": (c_ulong, ()),
    "SSL_CTX_get_options": (c_uint64, (c_void_p,)),
    "SSL_CTX_ctrl": (c_long, (c_void_p, c_int, c_long, c_void_p)),
    "SSL_CTX_set_session_id_context": (c_int, (c_void_p, c_char_p, c_uint)),
    "SSL_CTX_set_client_hello_cb": (None, (c_void_p, ClientHelloCallback, c_void_p)),
    "SSL_CTX_set_psk_server_callback": (None, (c_void_p, PskServerCallback)),
    "SSL_CTX_set_psk_client_callback": (None, (c_void_p, PskClientCallback)),
    "SSL_CTX_set_psk_find_session_callback": (None, (c_void_p, FindSessionCallback)),
    "SSL_CTX_set_psk_use_session_callback": (None, (c_void_p, UseSessionCallback)),
    "SSL_CTX_set_ciphersuites": (c_int, (c_void_p, c_char_p)),
    "SSL_set_ciphersuites": (c_int, (c_void_p, c_char_p)),
    "SSL_version": (c_int, (c_void_p,)),
    "SSL_client_hello_get0_ciphers": (c_size_t, (c_void_p, POINTER(c_void_p))),
    "SSL_client_hello_get0_ext": (c_int, (c_void_p, c_uint, POINTER(c_void_p), POINTER(c_size_t))),
    "SSL_CIPHER_find": (c_void_p, (c_void_p, c_char_p)),
    "SSL_CIPHER_standard_name": (c_char_p, (c_void_p,)),
    "SSL_SESSION_new": (c_void_p, ()),
    "SSL_SESSION_free": (None, (c_void_p,)),
    "SSL_SESSION_set1_master_key": (c_int, (c_void_p, c_char_p, c_size_t)),
    "SSL_SESSION_set_cipher": (c_int, (c_void_p, c_void_p)),
    "SSL_SESSION_set1_id_context": (c_int, (c_void_p, c_char_p, c_uint)),
    "SSL_SESSION_set_protocol_version": (c_int, (c_void_p, c_int)),
}


class Unsupported(Exception):
    """This interpreter is not built as expected; the message says how it differs."""


class Library:
    """The OpenSSL that the ssl module is linked with. Functions keep their C names."""

    def __init__(self) -> None:
        path = getattr(_ssl, "__file__", None)
        try:
            # Symbols are looked up in the module and its libraries, never in another copy of OpenSSL.
            library = ctypes.CDLL(path)
            for name, (result, arguments) in _PROTOTYPES.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
                setattr(self, name, function)
        except (OSError, AttributeError) as error:
            raise Unsupported(f"OpenSSL's functions cannot be reached ({error})") from error

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 -- functions of C
        raise AttributeError(name)

    def new_psk_session(self, ssl_pointer: int, key: bytes, cipher_id: bytes) -> int | None:
        """A TLS 1.3 session for an external pre-shared key (RFC 8446, 4.2.11). The caller owns it."""
        session: int | None = self.SSL_SESSION_new()
        if session is None:
            return None
        cipher = self.SSL_CIPHER_find(ssl_pointer, cipher_id)
        made = (
            cipher is not None
            and self.SSL_SESSION_set1_master_key(session, key, len(key))
            and self.SSL_SESSION_set_cipher(session, cipher)
            and self.SSL_SESSION_set_protocol_version(session, TLS_1_3)
        )
        if not made:
            self.SSL_SESSION_free(session)
            return None
        return session

    def offered_ciphers(self, ssl_pointer: int) -> bytes:
        """The cipher suites in a ClientHello, two bytes each. Only within the ClientHello callback."""
        start = c_void_p()
        length = self.SSL_client_hello_get0_ciphers(ssl_pointer, ctypes.byref(start))
        return ctypes.string_at(start, length) if start.value and length else b""

    def hello_extension(self, ssl_pointer: int, number: int) -> bytes | None:
        """One extension of a ClientHello. Only within the ClientHello callback."""
        start, length = c_void_p(), c_size_t()
        if not self.SSL_client_hello_get0_ext(ssl_pointer, number, ctypes.byref(start), ctypes.byref(length)):
            return None
        return ctypes.string_at(start, length.value) if start.value and length.value else b""

    def cipher_name(self, ssl_pointer: int, cipher_id: bytes) -> str:
        """The suite's standard name, or its number if OpenSSL has no name."""
        cipher = self.SSL_CIPHER_find(ssl_pointer, cipher_id)
        name = self.SSL_CIPHER_standard_name(cipher) if cipher is not None else None
        return name.decode() if name else f"0x{cipher_id.hex().upper()}"

    def forget_sessions(self, context: ssl.SSLContext) -> None:
        """No session is kept for resumption: every client authenticates again, and nothing grows."""
        self.SSL_CTX_ctrl(context_pointer(context), _SET_SESSION_CACHE_MODE, 0, None)

    def set_groups(self, context: ssl.SSLContext, groups: str) -> bool:
        """Sets the key exchange groups in order of preference; False if this OpenSSL does not support the list."""
        return self._set_list(context, _SET_GROUPS_LIST, groups)

    def set_signature_algorithms(self, context: ssl.SSLContext, algorithms: str) -> bool:
        """Sets the signature algorithms of both sides; False if this OpenSSL does not support the list."""
        return self._set_list(context, _SET_SIGALGS_LIST, algorithms)

    def _set_list(self, context: ssl.SSLContext, command: int, names: str) -> bool:
        # OpenSSL 3.5 accepts an empty list, older releases do not.
        if names and self.SSL_CTX_ctrl(context_pointer(context), command, 0, names.encode()) == 1:
            return True
        # An error left in this thread's queue would count as a failure of the next connection.
        self.ERR_clear_error()
        return False


@cache
def library() -> Library:
    """The library, loaded on first use. Raises Unsupported."""
    if sys.implementation.name != "cpython":
        raise Unsupported(f"the interpreter is {sys.implementation.name}, not CPython")
    return Library()


def context_pointer(context: ssl.SSLContext) -> int:
    """The context's ``SSL_CTX *``."""
    return c_void_p.from_address(id(context) + object.__basicsize__).value or 0


def prove_pointer() -> None:
    """Raises Unsupported unless OpenSSL's options at ``context_pointer`` equal Python's, for two different values."""
    for option in (ssl.OP_NO_TICKET, ssl.OP_NO_TICKET | ssl.OP_SINGLE_DH_USE | ssl.OP_NO_TLSv1_1):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.options |= option
        pointer = context_pointer(context)
        # Only the low 32 bits are compared: some Python releases sign-extend the value.
        if not pointer or (library().SSL_CTX_get_options(pointer) ^ context.options) & 0xFFFFFFFF:
            raise Unsupported("the interpreter's SSLContext is not laid out as expected")
