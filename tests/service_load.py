"""`kitseg serve` under load, in a process of its own: ``nox -s service``."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
from http_service import TOKEN, Answer, request, zipped
from method_runs import untrained

from kitseg.types import Geometry
from kitseg.volumes.nifti import write_image

CLIENTS, REQUESTS = 8, 50
MOST_MB = 100.0  # that memory may grow between the fifth request and the last


class Server:
    """The service, which can be restarted."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])
        self.folder = folder
        self.start()

    def start(self) -> None:
        options = [
            f"--port={self.port}",
            "--root=root",
            "--model=run",
            "--engine=torch",
            "--max-body=20MB",
            f"--queue={CLIENTS}",
        ]
        environment = {**os.environ, "KITSEG_TOKEN": TOKEN, "TMPDIR": str(self.folder / "tmp")}
        log = (self.folder / "log.txt").open("a")
        command = [sys.executable, "-m", "kitseg", "serve", f"--port={self.port}", *options]
        self.process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log)
        for _ in range(1200):
            try:
                assert request(self.port, None).status == 200
                return
            except ConnectionError:
                assert self.process.poll() is None, (self.folder / "log.txt").read_text()
                time.sleep(0.1)
        raise TimeoutError("the service did not start")

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(120)

    @property
    def megabytes(self) -> float:
        return psutil.Process(self.process.pid).memory_info().rss / 1e6

    def ask(self, body: bytes | str) -> Answer:
        """An answer, asked for again where the service restarts or its queue is full."""
        for _ in range(600):
            try:
                if (answer := request(self.port, body)).status != 503:
                    return answer
            except (ConnectionError, TimeoutError):
                pass
            time.sleep(0.2)
        raise TimeoutError("no answer")


def hostile(server: Server) -> None:
    """Requests that must be refused, and a client that leaves."""
    bomb = zipped(a__nii=b"\0" * 10)
    cases: tuple[tuple[int, bytes | str, dict[str, str]], ...] = (
        (422, b"PK\x03\x04 broken", {}),
        (422, zipped(**{"../../outside__nii": b"x"}), {}),
        (422, bomb.replace(b"\x0a\x00\x00\x00\x0a\x00\x00\x00", b"\x0a\x00\x00\x00\xff\xff\xff\x7f"), {}),
        (422, zipped(a__nii__gz=os.urandom(1000)), {}),
        (413, b"\0" * 20_000_001, {}),
        (403, "../run/config.yaml", {}),
        (403, "/etc", {}),
        (400, b"", {"host": "evil.example"}),
        (401, b"", {"authorization": "Bearer wrong"}),
    )
    for status, body, headers in cases:
        for _ in range(600):
            try:
                found = request(server.port, body, **headers).status
            except (BrokenPipeError, ConnectionResetError):
                found = 413  # refused before the body was read
            if found != 503:
                break
            time.sleep(0.2)
        assert found == status, (found, status, body[:40])
    head = f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n"
    for length in (100, 2):
        rest = f"Content-Type: application/zip\r\nContent-Length: {length}\r\n\r\nPK"
        with socket.create_connection(("127.0.0.1", server.port)) as gone:
            gone.sendall((head + rest).encode())


def answers(server: Server, bodies: list[bytes | str]) -> list[Answer]:
    """The answers to requests from several clients at once."""
    with ThreadPoolExecutor(CLIENTS) as clients:
        return list(clients.map(server.ask, bodies))


def check(found: list[Answer], count: int) -> None:
    assert [answer.status for answer in found] == [200] * count, [answer.status for answer in found]
    assert all({"scan.nii.gz", "scan.json", "scan.html"} <= answer.files.keys() for answer in found)


def main(folder: Path) -> None:
    for name in ("root", "tmp"):
        (folder / name).mkdir()
    untrained(folder / "run")
    hu = np.random.default_rng(0).integers(-200, 300, (8, 20, 24)).astype(np.int16)
    grid = Geometry((24, 20, 8), np.diag([-2.0, -2.0, 3.0, 1.0]))
    write_image(folder / "root" / "a.nii.gz", hu, grid)
    bodies: list[bytes | str] = [zipped(a__nii__gz=folder / "root" / "a.nii.gz"), "a.nii.gz"]
    server = Server(folder)
    try:
        check([server.ask(bodies[n % 2]) for n in range(5)], 5)
        before, begun = server.megabytes, time.perf_counter()
        refusals = ThreadPoolExecutor(1).submit(hostile, server)
        check(answers(server, bodies * (REQUESTS // 2)), REQUESTS)
        refusals.result()
        grown, seconds = server.megabytes - before, time.perf_counter() - begun
        print(
            f"{REQUESTS} requests from {CLIENTS} clients in {seconds:.0f} s; {before:.0f} MB after 5, {grown:+.0f} MB"
        )
        assert grown < MOST_MB
        restart = threading.Timer(max(1, seconds / REQUESTS * 4), lambda: (server.stop(), server.start()))
        restart.start()
        check(answers(server, bodies * CLIENTS), 2 * CLIENTS)
        restart.join()
        print(f"{2 * CLIENTS} requests with a restart in between: none lost")
        threading.Thread(target=server.ask, args=(bodies[0],), daemon=True).start()
        time.sleep(0.5)
        server.stop(signal.SIGKILL)
        left = len(list((folder / "tmp").iterdir()))
        server.start()
        (own,) = (folder / "tmp").iterdir()
        assert server.ask(bodies[0]).status == 200
        while json.loads(request(server.port, None).body)["requests"]:
            time.sleep(0.1)
        assert list(own.iterdir()) == []
        print(f"a killed service left {left} folder, which the next one removed")
        assert server.stop() == 143
        assert list((folder / "tmp").iterdir()) == []
    finally:
        server.process.kill()
    assert "a.nii" not in (folder / "log.txt").read_text(), "a name of a scan"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
