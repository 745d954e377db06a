"""MLflow that cannot answer is an error of its own, never a missing model."""

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from pipelines import tracking
from pipelines.errors import TrackingError


@pytest.fixture
def failing_server(lake: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that is up, and fails at every question."""

    class Fails(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(200 if self.path == "/health" else 500)

        do_POST = do_GET

        def log_message(self, *_: object) -> None: ...

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with ThreadingHTTPServer(("127.0.0.1", 0), Fails) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        yield uri
        server.shutdown()


def test_a_server_that_fails_is_not_a_missing_model(failing_server: str) -> None:
    tracking.check_reachable()
    with pytest.raises(TrackingError, match=rf"MLflow at {failing_server}: look up models:/m-1: .*500"):
        tracking.model_exists("models:/m-1")
    with pytest.raises(TrackingError, match=rf"MLflow at {failing_server}: .*500"):
        tracking.champion("digits")


def test_a_model_that_is_not_there(lake: Path) -> None:
    assert not tracking.model_exists("models:/m-1")
    assert tracking.champion("digits") is None
