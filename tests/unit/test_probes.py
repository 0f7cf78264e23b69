"""What the probes say of a service, by the metrics and the health that it shows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from skipbus.services.probes import alive_fault, ready_fault


def tasks(tried: float = 0.1, done: float = 0.1, interval: float = 1) -> str:
    return (
        "# TYPE skipbus_task_interval_seconds gauge\n"
        f'skipbus_task_interval_seconds{{task="store"}} {interval}\n'
        f'skipbus_task_tried_age_seconds{{task="store"}} {tried}\n'
        f'skipbus_task_done_age_seconds{{task="store"}} {done}\n'
    )


class Service:
    """Shows what it is given."""

    def __init__(self) -> None:
        pages: dict[str, tuple[int, str]] = {}
        self.pages = pages

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, text = pages[self.path]
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- the base class's name
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def environ(self) -> Mapping[str, str]:
        port = str(self.server.server_address[1])
        return {"SKIP_METRICS_PORT": port, "SKIP_PORT": port}


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_an_api_is_ready_while_its_health_is_200(service: Service) -> None:
    service.pages |= {"/metrics": (200, tasks()), "/health": (200, "{}")}
    assert ready_fault(service.environ) is None


def test_an_api_that_cannot_serve_keys_is_alive_and_says_why_it_is_not_ready(service: Service) -> None:
    health = json.dumps({"faults": ["the key store does not answer"]})
    service.pages |= {"/metrics": (200, tasks()), "/health": (503, health)}
    assert alive_fault(service.environ) is None
    assert ready_fault(service.environ) == "alive, not ready: the key store does not answer"


@pytest.mark.parametrize("own", ["skipbus_bus_up 1.0", "skipbus_janitor_elected 0.0"])
def test_what_is_no_api_is_not_asked_for_its_health(service: Service, own: str) -> None:
    service.pages |= {"/metrics": (200, tasks() + own + "\n")}
    assert ready_fault(service.environ) is None


def test_a_syncer_without_its_broker_is_not_ready(service: Service) -> None:
    service.pages |= {"/metrics": (200, tasks() + "skipbus_bus_up 0.0\n")}
    assert ready_fault(service.environ) == "alive, not ready: the broker is away, or does not confirm messages"


def test_a_task_that_fails_again_and_again_makes_a_service_not_ready(service: Service) -> None:
    service.pages |= {"/metrics": (200, tasks(done=20) + "skipbus_janitor_elected 1.0\n")}
    assert alive_fault(service.environ) is None
    assert ready_fault(service.environ) == "alive, not ready: 'store' has not succeeded lately"


def test_a_task_that_never_succeeded_makes_a_service_not_ready(service: Service) -> None:
    service.pages |= {"/metrics": (200, tasks(done=float("inf")).replace("inf", "+Inf"))}
    assert ready_fault(service.environ) is not None


def test_a_long_interval_is_no_fault(service: Service) -> None:
    service.pages |= {"/metrics": (200, tasks(tried=100, done=100, interval=60) + "skipbus_janitor_elected 1.0\n")}
    assert ready_fault(service.environ) is None


def test_an_event_loop_that_hangs_is_not_alive(service: Service) -> None:
    service.pages |= {"/metrics": (200, tasks(tried=60, done=60))}
    assert alive_fault(service.environ) == "not alive: no regular task was started in the last 15 s"


def test_a_process_that_does_not_answer_is_not_alive(service: Service) -> None:
    assert "did not answer" in str(alive_fault({"SKIP_METRICS_PORT": "9"}))


def test_without_metrics_a_probe_says_what_to_set() -> None:
    assert "SKIP_METRICS_PORT" in str(alive_fault({}))
