"""Ctrl-C, SIGTERM and SIGUSR1 end a command within seconds, whatever it is doing."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from types import FrameType
from typing import NoReturn

from kitseg.runtime.console import print_error

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
PATIENCE = 3.0  # seconds that a command has to end in order
LAST_WORDS = "stopped: what is written is whole, and the same command goes on"


_asked: list[int] = []


class Stopped(SystemExit):
    """A signal has asked the command to end; the code is 128 + its number, as a shell has it."""

    code: int


def obey() -> None:
    """Raise ``Stopped`` again where a library has made an error of its own of it."""
    if _asked:
        raise Stopped(128 + _asked[0])


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, a signal raises ``Stopped``, so that what was begun is cleaned up on the way out.

    Where that takes too long, as in a long computation outside of Python, the process ends all the same: files have
    their names only when they are whole. Who handles a signal on its own inside, as a training does, has its time.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in SIGNALS}
    heard, told = os.pipe()
    os.set_blocking(told, False)
    wakeup, over = signal.set_wakeup_fd(told, warn_on_full_buffer=False), threading.Event()
    threading.Thread(target=_watch, args=(heard, over), daemon=True).start()
    try:
        yield
    except Stopped as stopped:
        _end(stopped.code)
    finally:
        over.set()
        _asked.clear()
        signal.set_wakeup_fd(wakeup)
        os.close(told)
        for number, handler in before.items():
            signal.signal(number, handler)


def stop(number: int, frame: FrameType | None) -> None:
    """Handle a signal: raise ``Stopped``, once."""
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)  # cleaning up is not interrupted
    _asked.append(number)
    obey()


def _watch(heard: int, over: threading.Event) -> None:
    """End the process where the main thread doesn't; the interpreter tells of signals at once through ``heard``."""
    while byte := os.read(heard, 1):
        asked = byte[0] in SIGNALS and signal.getsignal(byte[0]) in (stop, signal.SIG_IGN)
        if asked and not over.wait(PATIENCE):
            _end(128 + byte[0])
    os.close(heard)


def _end(code: int) -> NoReturn:
    """End at once: libraries take seconds to say goodbye."""
    for child in active_children():
        child.kill()
    print_error(LAST_WORDS)
    sys.stdout.flush()
    os._exit(code)
