"""The pixels of DICOM slices in HU; compressed ones are decoded in a process of their own."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray

from kitseg.errors import InputError
from kitseg.volumes.dicom.headers import Header, decimal_text, read_dataset

AIR = -1024  # HU outside the reconstructed circle; air is never lower
TISSUE = (-500, 1500)  # HU; a padding value in this range can't be distinguished from the patient
_INT16 = np.iinfo(np.int16)
_RESCALE = (("Slope", 1), ("Intercept", 0))
#: ``-P``: no module of the current folder, which may hold anything.
_DECODER = (sys.executable, "-P", "-c", "from kitseg.volumes.dicom.pixels import serve; serve()")


def read_planes(headers: Sequence[Header]) -> Iterator[NDArray[np.int16]]:
    """Each slice (rows, columns) in HU, in this order.

    Decoders are native code, which a damaged file may crash: only the process that decodes ends then.

    Raises:
        InputError: a slice can't be read.
    """
    if not any(header.is_packed for header in headers):
        yield from map(read_slice, headers)
        return
    with _decoder() as decoder:
        for header in headers:
            yield _decoded(decoder, header)


def read_slice(header: Header) -> NDArray[np.int16]:
    """One slice (rows, columns) in HU, decoded here. Raises InputError: it can't be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = read_dataset(header.path, stop_before_pixels=False)
            hu = _hounsfield(found, found.pixel_array)
        except Exception as error:  # decoders raise many types
            raise _unreadable(header, type(error).__name__) from error  # the message may quote patient data
    if hu.shape != header.size:
        raise InputError(header.path, f"the slice is {hu.shape}, but its header has {header.size}", "Export it again")
    return hu


def serve() -> None:
    """Decode the slices that standard input names, for ``read_planes``: of each a line of JSON, then its pixels."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # decoders may write there
    for line in sys.stdin.buffer:
        path, size = json.loads(line)
        fact: dict[str, str] = {}
        content = b""
        try:
            content = read_slice(Header(Path(path), size=tuple(size))).tobytes()
        except InputError as error:
            fact = {"problem": error.problem, "remedy": error.remedy}
        answers.write(json.dumps(fact).encode() + b"\n" + content)
        answers.flush()


@contextmanager
def _decoder() -> Iterator[subprocess.Popen[bytes]]:
    """A process that decodes, see ``serve``; signals are for this one, which ends it."""
    from kitseg.runtime.signals import SIGNALS, blocked  # imported here: the decoder starts sooner without

    here = [str(Path(__file__).parents[3]), *filter(None, sys.path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(here)}
    pipe, silent = subprocess.PIPE, subprocess.DEVNULL
    with blocked(*SIGNALS):
        process = subprocess.Popen(_DECODER, stdin=pipe, stdout=pipe, stderr=silent, env=environment)
    with process:
        try:
            yield process
        finally:
            process.kill()


def _decoded(decoder: subprocess.Popen[bytes], header: Header) -> NDArray[np.int16]:
    assert decoder.stdin
    assert decoder.stdout
    question = json.dumps([str(header.path), header.size]).encode() + b"\n"
    with suppress(BrokenPipeError):  # then there is no answer
        os.write(decoder.stdin.fileno(), question)  # no buffer, which would be written again at the end
    fact = json.loads(decoder.stdout.readline() or "{}")
    if fact:
        raise InputError(header.path, **fact)
    content = decoder.stdout.read(2 * math.prod(header.size))
    if len(content) != 2 * math.prod(header.size):
        raise _unreadable(header, "the decoder crashed")
    return np.frombuffer(content, np.int16).reshape(header.size)


def _unreadable(header: Header, reason: str) -> InputError:
    return InputError(header.path, f"the pixels can't be read ({reason})", "Export the series again")


def _hounsfield(found: pydicom.Dataset, stored: NDArray[Any]) -> NDArray[np.int16]:
    slope, intercept = (float(decimal_text(found, f"Rescale{name}") or default) for name, default in _RESCALE)
    if slope == 0 or not math.isfinite(slope + intercept):
        raise ValueError("rescale slope is 0, or slope or intercept is not finite")
    hu = np.rint(stored.astype(np.float32) * np.float32(slope) + np.float32(intercept))
    if (padding := _padding(found)) is not None:
        low, high = padding
        value = low * slope + intercept
        if not TISSUE[0] <= value <= TISSUE[1]:
            hu[(stored >= low) & (stored <= high)] = AIR
    clipped: NDArray[np.int16] = hu.clip(AIR, _INT16.max).astype(np.int16)
    return clipped


def _padding(found: pydicom.Dataset) -> tuple[int, int] | None:
    """The lowest and highest stored padding value, converted to the sign of the pixels."""
    values = [found.get("PixelPaddingValue"), found.get("PixelPaddingRangeLimit")]
    bits, signed = int(found.BitsAllocated), bool(found.PixelRepresentation)
    plain = [int(v) % 2**bits for v in values if v is not None and v != ""]
    turned = [v - 2**bits if signed and v >= 2 ** (bits - 1) else v for v in plain]
    return (min(turned), max(turned)) if turned and values[0] is not None else None
