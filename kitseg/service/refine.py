"""The page on which a person corrects labels with clicks, and what it asks the service for."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from fastapi import FastAPI, HTTPException, Request, Response
from numpy.typing import NDArray

from kitseg.commands.measure import plan_measures
from kitseg.commands.refine import Click, Refinement
from kitseg.errors import UsageError
from kitseg.service import http
from kitseg.service.work import refuse_links
from kitseg.types import Case, Volume

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
LARGEST_BODY = 1 << 18
Asked = TypeVar("Asked")


class _Open(msgspec.Struct):
    scan: str
    labels: str


class _Mark(msgspec.Struct):
    voxel: tuple[int, int, int]
    label: str
    to: tuple[int, int, int] | None = None


class _Clicks(msgspec.Struct):
    id: str
    clicks: list[_Mark]


@dataclass
class _Case:
    """The open case: its labels before the clicks and after them."""

    id: str
    opened: Refinement
    clicks: list[Click]
    labels: NDArray[np.uint8]

    def click(self, mark: _Mark) -> Click:
        """A click at the middle of a voxel (slice, row, column), in mm, or a box between two."""
        ends = [mark.voxel, *([mark.to] if mark.to else [])]
        point, *to = ((self.opened.scan.geometry.affine @ [*end, 1])[:3] * (-1, -1, 1) for end in ends)
        x, y, z, *corner = (round(float(mm), 3) for end in (point, *to) for mm in end)
        return Click(x, y, z, mark.label, tuple(corner) or None)

    def follow(self, clicks: list[Click]) -> None:
        """Let the labels be those after these clicks, of which the last or none may be new."""
        known = self.clicks if clicks[: len(self.clicks)] == self.clicks else []
        base = replace(self.opened, labels=self.labels) if known else self.opened
        self.labels, self.clicks = base.apply(clicks[len(known) :], known), clicks


@dataclass
class RefinePage:
    """Corrects one case at a time, whose files lie below the service's root.

    output: folder of the corrected labels; background: the model's probability of it in a scan, None to do without;
    check: raises UsageError for a scan that needs too much memory.
    """

    service: http.Service
    output: Path
    background: Callable[[Volume], NDArray[np.float16]] | None = None
    check: Callable[[Case], None] = lambda _: None
    _case: _Case | None = None

    def add_to(self, app: FastAPI) -> None:
        """Add the page and its requests to the service's application."""
        app.get("/refine")(self.page)
        for name, answer in (("open", self.open), ("slice", self.slice), ("clicks", self.clicks), ("save", self.save)):
            app.post(f"/refine/{name}")(answer)

    def page(self) -> Response:
        """The page itself, which holds no data."""
        html = files("kitseg.service").joinpath("refine.html").read_text(encoding="utf-8")
        return Response(html, media_type="text/html", headers={"Content-Security-Policy": POLICY})

    async def open(self, request: Request) -> Any:
        """Read a scan and its labels, and predict where there is background; other cases are closed."""
        return await self._answer(request, _Open, self._open)

    async def slice(self, request: Request, axis: int, index: int) -> Any:
        """HU (int16) and then labels (uint8) of a slice across an axis, row by row."""
        return await self._answer(request, _Clicks, lambda asked: self._slice(self._of(asked), axis, index))

    async def clicks(self, request: Request) -> Any:
        """Correct the labels with these clicks, in order."""
        return await self._answer(request, _Clicks, lambda asked: self._state(self._of(asked)))

    async def save(self, request: Request) -> Any:
        """Write the labels and their record."""
        return await self._answer(request, _Clicks, self._save)

    async def _answer(self, request: Request, kind: type[Asked], work: Callable[[Asked], Any]) -> Any:
        """Check a request, and work for it after those before it, in the thread that predicts."""
        with self.service.admitted(request), http.errors_as_answers():
            asked = _decoded(await _body(request), kind)
            loop = asyncio.get_running_loop()
            return await asyncio.shield(loop.run_in_executor(self.service.thread, work, asked))

    def _open(self, asked: _Open) -> dict[str, Any]:
        scan, labels = self.service.place(asked.scan), self.service.place(asked.labels)
        tasks = plan_measures(labels, scan)
        if len(tasks) != 1:
            raise UsageError(f"{asked.labels} holds {len(tasks)} label maps: give one")
        source = tasks[0].scan
        assert self.service.root
        assert source
        refuse_links((*(source.slices or (source.image,)), tasks[0].labels), [self.service.root])
        self.check(source)
        self._case = None  # its memory is needed
        opened = Refinement.open(tasks[0], self.output)
        if self.background:
            opened = replace(opened, background=self.background(opened.scan))
        self._case = _Case(secrets.token_urlsafe(9), opened, [], opened.labels)
        return {
            "id": self._case.id,
            "case": opened.task.case,
            "scan": os.path.relpath(os.path.realpath(source.image), os.path.realpath(self.service.root)),
            "classes": ["background", *opened.scheme.classes],
            "earlier": len(opened.before.corrected),
            "shape": opened.scan.geometry.shape,
            "spacing": opened.scan.geometry.spacing,
            **self._state(self._case),
        }

    def _of(self, asked: _Clicks) -> _Case:
        """The open case, after these clicks."""
        case = self._case
        if case is None or case.id != asked.id:
            raise UsageError("this case is not open any more: open it again")
        case.follow([case.click(mark) for mark in asked.clicks])
        return case

    def _slice(self, case: _Case, axis: int, index: int) -> Response:
        scan = case.opened.scan.array
        if not (0 <= axis < 3 and 0 <= index < scan.shape[axis]):
            raise UsageError("there is no such slice")
        hu, labels = (np.ascontiguousarray(array.take(index, axis)) for array in (scan, case.labels))
        content = np.clip(hu, -32768, 32767).astype("<i2").tobytes() + labels.tobytes()
        return Response(content, media_type="application/octet-stream", headers={"Cache-Control": "no-store"})

    def _state(self, case: _Case) -> dict[str, Any]:
        return {"volumes_ml": case.opened.volumes_ml(case.labels), "clicks": len(case.clicks)}

    def _save(self, asked: _Clicks) -> dict[str, str]:
        case = self._of(asked)
        if not case.clicks:
            raise UsageError("there is no click to save")
        case.opened = case.opened.save(case.labels, case.clicks)
        return {"saved": str(case.opened.target)}


async def _body(request: Request) -> bytes:
    body = bytearray()
    await http.take_body(request, LARGEST_BODY, lambda part: asyncio.to_thread(body.extend, part))
    return bytes(body)


def _decoded(body: bytes, kind: type[Asked]) -> Asked:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise HTTPException(400, "the JSON is not that of this request") from error
