"""What the scripts of all sides share: how a rate is measured, and how the result reaches ``run.py``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any


def rate(draw: Callable[[], Any], each: int, warm_up: int = 5, seconds: float = 20.0) -> float:
    """How many a second when ``draw`` gives ``each``: the first draws aren't counted, then for some seconds."""
    for _ in range(warm_up):
        draw()
    begun, drawn = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        draw()
        drawn += each
    return drawn / (time.perf_counter() - begun)


def say(value: float, **more: Any) -> None:
    """The last line of a script: what was measured."""
    print(json.dumps({"value": value, **more}), flush=True)
