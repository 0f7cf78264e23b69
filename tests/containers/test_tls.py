"""TLS on the image's Python and OpenSSL (3.13 and 3.5): the suites of the tests, and what only this OpenSSL has.

They run in a container of their own, with the working copy mounted and Debian's clients; no store and no broker are
needed. A run that fails shows its end, and one that ran no test fails.
"""

from __future__ import annotations

import re
import secrets

import pytest

from tests.containers.engine import docker
from tests.containers.stack import REPOSITORY

_TIMEOUT_SECONDS = 900
_VERSIONS = "import ssl, sys; print(*sys.version_info[:2], *ssl.OPENSSL_VERSION_INFO[:2])"


def in_test_image(test_image: str, *command: str) -> str:
    """What a command prints that runs beside the working copy, which it cannot change."""
    name = f"skipbus-test-{secrets.token_hex(4)}"
    # With a network: one test looks from an address of the host that is not loopback.
    options = ("--rm", "--init", f"--name={name}", f"--volume={REPOSITORY}:/skipbus:ro")
    try:
        return docker("run", *options, test_image, *command, timeout_seconds=_TIMEOUT_SECONDS)
    except BaseException:
        # A client that was ended, for its time or by Ctrl-C, leaves its container running.
        docker("rm", "--force", name)
        raise


def test_the_test_image_has_the_python_and_the_openssl_of_the_image(image: str, test_image: str) -> None:
    versions = docker("run", "--rm", image, "python", "-c", _VERSIONS)
    assert in_test_image(test_image, "python", "-c", _VERSIONS) == versions
    assert tuple(map(int, versions.split()))[2:] >= (3, 5)


@pytest.mark.parametrize(
    "module",
    [
        "tests/containers/hybrid_group.py",
        "tests/system/test_tls_suites.py",
        "tests/system/test_tls_refusals.py",
        "tests/system/test_tls_attacks.py",
        "tests/system/test_tls_files.py",
    ],
)
def test_tls_holds_on_the_image_s_python(test_image: str, module: str) -> None:
    output = in_test_image(test_image, "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", module)
    ran = re.search(r"^(\d+) passed", output, re.MULTILINE)
    assert ran is not None, output[-2000:]
    assert int(ran[1]) > 0
