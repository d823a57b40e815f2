"""A real S3 server on this machine (moto), that can be told to fail."""

import gc
import itertools
import logging
import os
import socket
import threading
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

KEY = "testing"
BUCKETS = itertools.count()


class Fault(NamedTuple):
    """What happens to one request, in place of its work or of its answer."""

    answer: Callable[[Any, Callable[[], Any]], Any]  # (environ, work) -> WSGI body
    methods: tuple[str, ...]  # of HTTP, to which it happens; none: all


class Server:
    """The server at `url`. Faults happen to the next requests, in the order in which they were ordered."""

    def __init__(self):
        moto = pytest.importorskip("moto.server")
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # or it notes every request
        self._moto = moto.DomainDispatcherApplication(moto.create_backend_app)
        self._one_by_one = threading.Lock()  # S3 looks and writes in one step, moto in two
        self._faults: deque[Fault] = deque()
        self._healed = threading.Event()
        self.seen: list[str] = []  # 'PUT /bucket/key', ...
        self._server = make_server(
            "127.0.0.1", 0, self._answer, True, request_handler=moto.MotoRequestHandler
        )
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.heal()
        self._server.shutdown()
        self._server.server_close()

    # ---- faults

    def fail(self, times: int, code: str = "500 InternalError", methods: tuple[str, ...] = ()) -> None:
        """An error, as '503 SlowDown', and no work."""

        def answer(environ, work):
            name = code.partition(" ")[2]
            body = f"<Error><Code>{name}</Code><Message>It is\nbroken</Message></Error>".encode()
            headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
            return code, headers, [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

        self._faults.extend([Fault(answer, methods)] * times)

    def hang(self, times: int, methods: tuple[str, ...] = ()) -> None:
        """Neither work nor answer, until the server is healed."""

        def answer(environ, work):
            self._healed.wait()
            return "500 InternalError", [], []

        self._faults.extend([Fault(answer, methods)] * times)

    def lose_answers(self, times: int, methods: tuple[str, ...] = ()) -> None:
        """The work is done, but the connection breaks."""

        def answer(environ, work):
            work()
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError

        self._faults.extend([Fault(answer, methods)] * times)

    def heal(self) -> None:
        """No more faults; what hangs is let go."""
        self._faults.clear()
        self._healed.set()
        self._healed = threading.Event()

    @property
    def faults_left(self) -> int:
        return len(self._faults)

    # ---- WSGI

    def _answer(self, environ: dict[str, Any], start: Callable) -> Any:
        method = environ["REQUEST_METHOD"]
        self.seen.append(f"{method} {environ['PATH_INFO']}")

        def work(start=lambda *_: None):
            with self._one_by_one:
                return list(self._moto(environ, start))

        fault = self._next_fault(method)
        if fault is None:
            return work(start)
        code, headers, body = fault.answer(environ, work)
        start(code, headers)
        return body

    def _next_fault(self, method: str) -> Fault | None:
        for fault in list(self._faults):
            if not fault.methods or method in fault.methods:
                self._faults.remove(fault)
                return fault
        return None


class Bucket(NamedTuple):
    """An empty bucket of the server, for one test."""

    name: str
    server: Server

    @property
    def url(self) -> str:
        return f"s3://{self.name}/some/folder"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Server]:
    server = Server()
    gc.collect()
    gc.freeze()  # so many objects of moto and JAX: each client of S3 would have them searched
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A bucket, and the environment by which this process and its children find it."""
    environment = {
        "AWS_ENDPOINT_URL": s3_server.url,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "NO_PROXY": "127.0.0.1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    bucket = f"bucket-{next(BUCKETS)}"
    urllib.request.urlopen(urllib.request.Request(f"{s3_server.url}/{bucket}", method="PUT")).close()
    yield Bucket(bucket, s3_server)
    s3_server.heal()
