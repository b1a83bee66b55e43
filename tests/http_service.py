"""A running service, and requests to it."""

from __future__ import annotations

import http.client
import io
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

import uvicorn

from kitseg.service.http import Service, config
from kitseg.service.work import scratch

TOKEN = "a-token-of-some-length"


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes

    @property
    def files(self) -> dict[str, bytes]:
        with ZipFile(io.BytesIO(self.body)) as archive:
            return {name: archive.read(name) for name in archive.namelist()}

    @property
    def detail(self) -> str:
        return str(json.loads(self.body)["detail"])


def request(port: int, body: bytes | str | None, query: str = "", **headers: str) -> Answer:
    """POST /predict with a zip, or with the path of a scan; GET /health without a body."""
    if body is None:
        return _send(port, "GET", "/health", None, headers)
    if isinstance(body, bytes):
        return _send(port, "POST", f"/predict{query}", body, {"content-type": "application/zip", **headers})
    return post(port, f"/predict{query}", {"path": body}, **headers)


def post(port: int, path: str, body: object, **headers: str) -> Answer:
    """POST a value as JSON."""
    return _send(port, "POST", path, json.dumps(body).encode(), headers)


def _send(port: int, method: str, path: str, content: bytes | None, headers: Mapping[str, str]) -> Answer:
    stated = {"authorization": f"Bearer {TOKEN}", "content-type": "application/json"}
    stated |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request(method, path, content, stated)
        answer = connection.getresponse()
        return Answer(answer.status, answer.read())
    finally:
        connection.close()


def zipped(**files: bytes | Path) -> bytes:
    """A zip of files; dots in names are written as two underscores."""
    packed = io.BytesIO()
    with ZipFile(packed, "w") as archive:
        for name, content in files.items():
            place = name.replace("__", ".")
            archive.writestr(place, content) if isinstance(content, bytes) else archive.write(content, place)
    return packed.getvalue()


@contextmanager
def running(service: Service, port: int, *hosts: str) -> Iterator[Path]:
    """The service in a thread; its folder of temporary files."""
    with scratch() as folder:
        server = uvicorn.Server(config(service, "127.0.0.1", port, ["127.0.0.1", *hosts]))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield folder
        finally:
            server.should_exit = True
            thread.join(30)
