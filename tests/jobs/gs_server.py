"""A Google Cloud Storage server on this machine (gcp-storage-emulator)."""

import itertools
import logging
import pathlib
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any, NamedTuple

import pytest

BUCKETS = itertools.count()


class Bucket(NamedTuple):
    """An empty bucket of the server, for one test."""

    name: str
    failures: list[HTTPStatus]  # what the next uploads are answered

    @property
    def url(self) -> str:
        return f"gs://{self.name}/some/folder"


class Server:
    """The server at `url`. It answers one request after the other."""

    def __init__(self):
        pytest.importorskip("gcp_storage_emulator")
        from gcp_storage_emulator import server
        from gcp_storage_emulator.handlers import objects

        logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
        self.failures: list[HTTPStatus] = []
        upload = objects._multipart_upload

        def upload_if(request: Any, response: Any, storage: Any) -> None:
            """The emulator knows no conditional writes."""
            place = request.params["bucket_name"], request.data["meta"]["name"]
            if self.failures:
                response.status = self.failures.pop()
            elif request.query.get("ifGenerationMatch") == ["0"] and _exists(storage, *place):
                response.status = HTTPStatus.PRECONDITION_FAILED
            else:
                upload(request, response, storage)

        objects._multipart_upload = upload_if
        self._server = server.create_server("127.0.0.1", 0, in_memory=True)
        self._server.start()
        self.url = f"http://127.0.0.1:{self._server._api._httpd.server_address[1]}"

    def make_bucket(self) -> Bucket:
        from gcp_storage_emulator.handlers import buckets

        name = f"bucket-{next(BUCKETS)}"
        buckets.create_bucket(name, self._server._storage)
        return Bucket(name, self.failures)

    def stop(self) -> None:
        self._server.stop()


def _exists(storage: Any, bucket: str, name: str) -> bool:
    from gcp_storage_emulator.exceptions import NotFound

    try:
        return storage.get_file_obj(bucket, name) is not None
    except NotFound:
        return False


@pytest.fixture(scope="session")
def gs_server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def gs(gs_server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Iterator[Bucket]:
    """A bucket, and the environment by which this process and its children find it."""
    environment = {
        "STORAGE_EMULATOR_HOST": gs_server.url,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # or it asks the emulator by gRPC
        "NO_GCE_CHECK": "true",
        "CLOUDSDK_CONFIG": str(tmp_path / "no-credentials"),
        "NO_PROXY": "127.0.0.1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    yield gs_server.make_bucket()
    gs_server.failures.clear()
