"""What both ends of the control port agree on: the tester's side must not need what the proxy itself needs."""

from __future__ import annotations

TLS_PORT = 8443
CONTROL_PORT = 9080
TOKEN_VARIABLE = "SKIPBUS_TESTKIT_TOKEN"  # noqa: S105 -- the variable's name
