"""The HTTP service: a scan in, a zip of labels, JSON and page out. Nothing is kept after the answer."""

from __future__ import annotations

import asyncio
import hmac
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from kitseg import __version__
from kitseg.commands.predict import output_endings
from kitseg.errors import KitsegError, UsageError, fault
from kitseg.runtime.console import print_plain
from kitseg.service.work import MachineFailure, internal_error, place_below, scratch

if TYPE_CHECKING:
    from kitseg.service.node import Node

UPLOAD_SECONDS = 600.0
IDLE_SECONDS = 15.0  # that a connection may be open without a request
MOST_IDLE = 32  # connections without a request; of more, the oldest are closed
LARGEST_JSON = 1 << 16
Work = Callable[[Path, Path, Sequence[str], bool], Path]


@dataclass(frozen=True)
class Limits:
    """queue: requests that may wait beside the one that runs; body: bytes of an upload."""

    queue: int = 16
    body: int = 2 << 30


@dataclass
class Service:
    """One prediction at a time, in the order of arrival.

    work: predicts a scan (``work.Predictor``); token: that every request but ``/health`` states; root: the folder that
    paths in requests refer to, None for uploads only; thread: the only one that predicts; pages: what adds further
    requests to the application.
    """

    work: Work
    token: str
    root: Path | None = None
    limits: Limits = Limits()
    waiting: int = 0
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    pages: list[Callable[[FastAPI], None]] = field(default_factory=list)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def authorize(self, request: Request) -> None:
        """Refuse a request without the token."""
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.token.encode()):
            raise HTTPException(401, "state the token: Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})

    @contextmanager
    def admitted(self, request: Request) -> Iterator[None]:
        """Count a request with the token among those that wait or run; refuse it where too many do."""
        self.authorize(request)
        if self.waiting > self.limits.queue:
            raise HTTPException(503, "the queue is full", {"Retry-After": "10"})
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    def place(self, path: str) -> Path:
        """A path below the root; others are refused."""
        try:
            return place_below(self.root, path)
        except (PermissionError, FileNotFoundError) as error:
            raise HTTPException(403 if isinstance(error, PermissionError) else 404, str(error)) from error

    def health(self) -> dict[str, str | int]:
        """Whether requests are accepted, and how many wait or run."""
        return {"status": "ok", "kitseg": __version__, "requests": self.waiting, "queue": self.limits.queue}

    async def predict(self, request: Request, format: str = "nifti", anonymous: bool = False) -> Response:
        """Predict the scan in the body (a zip), or at the ``path`` below the root in a JSON body."""
        with self.admitted(request):
            folder, begun, status = Path(tempfile.mkdtemp()), time.perf_counter(), 500
            try:
                with errors_as_answers():
                    endings = output_endings(format, "format=")
                    source = await self._source(request, folder)
                    async with self._turn:
                        if await request.is_disconnected():
                            raise HTTPException(499, "the client left")
                        packed = await self._run(source, folder / "out", endings, anonymous)
                    content, status = packed.read_bytes(), 200
                return Response(content, media_type="application/zip")
            except HTTPException as error:
                status = error.status_code
                raise
            finally:
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
                print_plain(f"{status} after {time.perf_counter() - begun:.1f} s, {self.waiting - 1} waiting")

    async def _run(self, source: Path, to: Path, endings: Sequence[str], anonymous: bool) -> Path:
        """Predict in the only thread for it, to its end even where this request is cancelled."""
        loop = asyncio.get_running_loop()
        return await asyncio.shield(loop.run_in_executor(self.thread, self.work, source, to, endings, anonymous))

    async def _source(self, request: Request, folder: Path) -> Path:
        """The scan that a request refers to, its body stored in the folder."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "application/json":
            return self.place(await self._path(request, folder / "request.json"))
        if kind != "application/zip":
            raise HTTPException(415, "send a zip of the scan (application/zip), or JSON with its path")
        await self._store(request, folder / "study.zip", self.limits.body)
        return folder / "study.zip"

    async def _path(self, request: Request, file: Path) -> str:
        await self._store(request, file, LARGEST_JSON)
        try:
            return msgspec.json.decode(file.read_bytes(), type=dict[str, str])["path"]
        except (msgspec.MsgspecError, KeyError, UnicodeDecodeError, RecursionError) as error:
            raise HTTPException(400, 'the JSON must be {"path": "PATH below --root"}') from error

    async def _store(self, request: Request, file: Path, most: int) -> None:
        with file.open("wb") as target:
            await take_body(request, most, lambda part: asyncio.to_thread(target.write, part))


async def take_body(request: Request, most: int, take: Callable[[bytes], Awaitable[object]]) -> None:
    """Take a body part by part; more bytes than allowed, or a body that takes too long, end the request."""
    large = HTTPException(413, f"the body has more than {most} bytes")
    stated = request.headers.get("content-length", "0")
    if not stated.isdecimal() or int(stated) > most:
        raise large
    try:
        async with asyncio.timeout(UPLOAD_SECONDS):
            async for chunk in request.stream():
                if (most := most - len(chunk)) < 0:
                    raise large
                await take(chunk)
    except TimeoutError as error:
        raise HTTPException(408, "the body took too long") from error


@contextmanager
def errors_as_answers() -> Iterator[None]:
    """Turn whatever goes wrong with one request into its answer, so that the service answers the next."""
    try:
        yield
    except HTTPException:
        raise
    except UsageError as error:
        raise HTTPException(400, str(error)) from error
    except MachineFailure as error:
        raise HTTPException(503, str(error)) from error
    except KitsegError as error:
        raise HTTPException(422, str(error)) from error
    except ClientDisconnect as error:
        raise HTTPException(499, "the client left") from error
    except Exception as error:
        print_plain(internal_error(error))
        found = fault(error)
        raise HTTPException(503 if found else 500, found[0] if found else "internal error") from error


def build_app(service: Service, hosts: Sequence[str]) -> FastAPI:
    """The application; ``hosts``: names and addresses that the Host header may hold, without port."""
    app = FastAPI(title="kitseg", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.get("/health")(service.health)
    app.post("/predict")(service.predict)
    for add in service.pages:
        add(app)
    app.add_middleware(
        TrustedHostMiddleware,
        allowed_hosts=[f"[{host}]" if ":" in host else host for host in hosts],
        www_redirect=False,
    )
    return app


class _Impatient(H11Protocol):
    """Closes connections without a request: each after some seconds, and the oldest ones where there are many.

    uvicorn alone waits for a first request forever, and refuses requests where there are too many connections.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.made = self.loop.time()
        idle = [one for one in self.connections if isinstance(one, _Impatient) and not one.is_busy]
        for one in sorted(idle, key=lambda one: one.made)[:-MOST_IDLE]:
            one.transport.close()
        self.loop.call_later(IDLE_SECONDS, self._check, None)

    @property
    def is_busy(self) -> bool:
        """Whether a request is under way."""
        return self.cycle is not None and not self.cycle.response_complete

    def _check(self, before: object) -> None:
        """before: the last request when this was checked last, or another object while one was under way."""
        if not self.is_busy and before is self.cycle:
            self.transport.close()
        elif not self.transport.is_closing():
            self.loop.call_later(IDLE_SECONDS, self._check, self if self.is_busy else self.cycle)


def config(service: Service, host: str, port: int, hosts: Sequence[str]) -> uvicorn.Config:
    """How uvicorn answers requests: a small number of connections, none of which can stay open for nothing."""
    return uvicorn.Config(
        build_app(service, hosts),
        host=host,
        port=port,
        http=_Impatient,  # on h11, which bounds the head of a request; uvicorn's other parser doesn't
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=service.limits.queue + 64,
        timeout_keep_alive=5,
    )


def serve(service: Service, host: str, port: int, hosts: Sequence[str], node: Node | None = None) -> None:
    """Answer requests until a signal comes; those that are under way are answered first.

    node: a DICOM node that runs as long, with the same queue; what it predicts then is predicted again after a restart.
    """
    with node or scratch():
        uvicorn.Server(config(service, host, port, hosts)).run()
