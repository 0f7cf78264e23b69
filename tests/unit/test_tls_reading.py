"""What is read on a TLS connection: all of the data, in order, however it comes; and little beside it."""

from __future__ import annotations

import _ssl
import ctypes
import random
import ssl
from pathlib import Path

import pytest

from skipbus.ctl.cert import make_certificates
from skipbus.services.api.tls.handshake import Reader, TooMuchBesideData

# As uvloop does.
READS_BYTES = 262_144


class Ends:
    """Both ends of a connection after its handshake, in memory; the server's reads are bounded."""

    def __init__(self, folder: Path, version: ssl.TLSVersion) -> None:
        server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server_context.load_cert_chain(folder / "ecdsa.pem", folder / "ecdsa.key")
        server_context.num_tickets = 0
        client_context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
        client_context.maximum_version = version
        self.sent, self.incoming, answers = ssl.MemoryBIO(), ssl.MemoryBIO(), ssl.MemoryBIO()
        self.client = client_context.wrap_bio(answers, self.sent, server_hostname="localhost")
        self.server = server_context.wrap_bio(self.incoming, answers, server_side=True)
        for end in (self.client, self.server) * 3:
            self.incoming.write(self.sent.read())
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
        self.ended = False
        self.reader = Reader(vars(self.server)["_sslobj"].read, self.incoming)

    def ask_for_new_keys(self, times: int) -> None:
        # `struct { PyObject_HEAD; PyObject *Socket; SSL *ssl; ... }` in every release from 3.11 to 3.13.
        inner = id(vars(self.client)["_sslobj"]) + object.__basicsize__ + 8
        pointer, library = ctypes.c_void_p.from_address(inner), ctypes.CDLL(_ssl.__file__)
        for _ in range(times):
            assert library.SSL_key_update(pointer, 0) == 1
            assert library.SSL_do_handshake(pointer) == 1

    def arrive(self, octets: bytes) -> bytes:
        """What the event loop hands on when so much has come: it reads while anything is left."""
        self.incoming.write(octets)
        data = []
        try:
            while self.incoming.pending or self.server.pending():
                data.append(self.reader.read(READS_BYTES))
                if not data[-1]:
                    self.ended = True
                    break
        except ssl.SSLWantReadError:
            pass
        return b"".join(data)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates") / "made"
    make_certificates(folder, "lab", ["localhost"], [])
    return folder


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("record_bytes", [1, 100, 5_000, 16_384])
@pytest.mark.parametrize("chunk_bytes", [700, 1_460, 4_097, READS_BYTES])
def test_all_data_is_read_in_order_however_it_comes(
    certificates: Path, version: ssl.TLSVersion, record_bytes: int, chunk_bytes: int
) -> None:
    ends = Ends(certificates, version)
    data = random.Random(1).randbytes(min(400_000, 4_000 * record_bytes))
    for start in range(0, len(data), record_bytes):
        ends.client.write(data[start : start + record_bytes])
    sealed = ends.sent.read()
    read = b"".join(ends.arrive(sealed[start : start + chunk_bytes]) for start in range(0, len(sealed), chunk_bytes))
    assert read == data


def test_a_few_new_keys_beside_each_record_are_no_end_of_a_connection(certificates: Path) -> None:
    ends = Ends(certificates, ssl.TLSVersion.TLSv1_3)
    for _ in range(3_000):
        ends.ask_for_new_keys(3)
        ends.client.write(b"data")
    assert ends.arrive(ends.sent.read()) == b"data" * 3_000


def test_new_keys_without_end_are_not_gone_through(certificates: Path) -> None:
    ends = Ends(certificates, ssl.TLSVersion.TLSv1_3)
    ends.ask_for_new_keys(9_000)
    with pytest.raises(TooMuchBesideData):
        ends.arrive(ends.sent.read())
    # OpenSSL was never handed the most of it.
    assert ends.incoming.pending <= 4_096


def test_new_keys_without_end_are_not_gone_through_for_some_data_between_them(certificates: Path) -> None:
    ends = Ends(certificates, ssl.TLSVersion.TLSv1_3)
    for _ in range(20):
        ends.ask_for_new_keys(400)
        ends.client.write(b"GET /capabilities HTTP/1.1\r\n\r\n")
    with pytest.raises(TooMuchBesideData):
        ends.arrive(ends.sent.read())


def test_the_other_side_s_goodbye_is_read_as_the_end(certificates: Path) -> None:
    ends = Ends(certificates, ssl.TLSVersion.TLSv1_3)
    ends.client.write(b"x" * 10_000)
    with pytest.raises(ssl.SSLWantReadError):
        ends.client.unwrap()
    assert ends.arrive(ends.sent.read()) == b"x" * 10_000
    assert ends.ended
