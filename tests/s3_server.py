"""moto's S3 on loopback, behind a gate that records requests and lets tests interrupt them."""

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import PurePosixPath
from threading import Thread

import fsspec
import pytest

BUCKET = "states"


class Gate:
    """WSGI middleware that every request passes through.

    Attributes:
        seen: requests for files, as `PUT shard-00001.safetensors`.
        cut: by request: called once instead of answering it; may return a status.
        port: the port it listens on.
    """

    def __init__(self, inner: Callable) -> None:
        self.inner = inner
        self.seen: list[str] = []
        self.cut: dict[str, Callable[[], str | None]] = {}
        self.port = 0

    def __call__(self, environ, start_response):
        """Record a request, then forward it or interrupt it."""
        path = PurePosixPath(environ["PATH_INFO"])
        request = f"{environ['REQUEST_METHOD']} {path.name}"
        if path.suffix:
            self.seen.append(request)
        if request in self.cut:
            start_response(self.cut.pop(request)() or "503 Slow Down", [])
            return []
        return self.inner(environ, start_response)

    def files(self, method: str) -> list[str]:
        """Files requested with a method, in order, since the last call; clears the record."""
        found = [name for verb, name in map(str.split, self.seen) if verb == method]
        self.seen.clear()
        return found


@contextmanager
def serve() -> Generator[Gate]:
    """Run a server."""
    moto = pytest.importorskip("moto.server", reason="needs moto, of the dev extra")
    pytest.importorskip("s3fs", reason="needs s3fs, of the s3 extra")
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    gate = Gate(moto.DomainDispatcherApplication(moto.create_backend_app))
    running = make_server("127.0.0.1", 0, gate, threaded=True)
    gate.port = running.server_port
    thread = Thread(target=running.serve_forever)
    thread.start()
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # cached clients of another server
    try:
        yield gate
    finally:
        running.shutdown()
        thread.join()


def point_client_at(gate: Gate, monkeypatch) -> None:
    """Set the address and credentials in the client's environment, and create a bucket."""
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{gate.port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    system = fsspec.filesystem("s3")
    if not system.exists(BUCKET):
        system.mkdir(BUCKET)
    gate.seen.clear()
