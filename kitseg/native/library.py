"""The compiled kernels: whether they are there, and calls with tensors. Imports no PyTorch by itself."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

if TYPE_CHECKING:
    from torch import Tensor

CHOSEN = "KITSEG_KERNELS"  # in the environment: another build of the kernels, such as one with sanitizers
WIDTHS = {16: "AVX-512", 8: "AVX2"}  # floats a vector
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt, malloc.h
_POINTER, _LONG = ctypes.c_void_p, ctypes.c_long


def _structure(name: str, pointers: str, numbers: str) -> type[ctypes.Structure]:
    fields = [*((name, _POINTER) for name in pointers.split()), *((name, _LONG) for name in numbers.split())]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


# The structures of kernels.cpp.
_BUFFERS = "x more weights bias slope y scratch moments"
Convolution = _structure(
    "Convolution",
    _BUFFERS,
    " ".join(f"size_{name}" for name in _BUFFERS.split())
    + " images depth height width channels_in channels_x channels_out pixel_in pixel_more pixel_out kind replicate"
    + " lanes threads",
)
_AXES = " ".join(f"{name}_{axis}" for name in ("in", "out", "kernel", "stride", "pad") for axis in "zyx")
Product = _structure(
    "Product",
    "x weights bias slope y scratch moments",
    "size_x size_weights size_bias size_slope size_y size_scratch size_moments images channels_in channels_out "
    f"{_AXES} transposed lanes threads",
)
Plan = _structure("Plan", "", "panel weights blocks scratch lead z y x tiles a b c d e")
Pointwise = _structure(
    "Pointwise",
    "x scale shift first second residual more moments",
    "size_x size_channels size_residual size_more size_moments voxels channels channels_residual lanes threads",
)


@cache
def library() -> ctypes.CDLL | None:
    """The kernels; None where they can't be used: not compiled, outdated, or on a CPU with neither AVX-512 nor AVX2."""
    found = _compiled()
    return found if found and found.kitseg_lanes() and not is_outdated(found) else None


@cache
def _compiled() -> ctypes.CDLL | None:
    places = [Path(__file__).with_name(f"kernels{suffix}") for suffix in EXTENSION_SUFFIXES]
    for path in (Path(os.environ[CHOSEN]),) if os.environ.get(CHOSEN) else places:
        if path.is_file():
            found = ctypes.CDLL(str(path))
            found.kitseg_lanes.restype = _LONG
            return found
    return None


def is_outdated(kernels: ctypes.CDLL) -> bool:
    """Whether the sources beside this module, in a checkout, are others than the kernels were compiled from."""
    sources = sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".cpp", ".h"))
    if not sources or os.environ.get(CHOSEN):
        return False
    return not hasattr(kernels, f"kitseg_sources_{crc32(b''.join(path.read_bytes() for path in sources)):08x}")


@cache
def keep_memory() -> None:
    """Let the process keep the memory that it frees, where its C library can: new pages cost more than a layer.

    ``release_memory`` gives it back.
    """
    system = ctypes.CDLL(None)
    if hasattr(system, "mallopt"):
        system.mallopt(_MMAP_MAX, 0)
        system.mallopt(_TRIM_THRESHOLD, -1)


def release_memory() -> None:
    """Give memory that was freed back to the system, where the C library can."""
    system = ctypes.CDLL(None)
    if hasattr(system, "malloc_trim"):
        system.malloc_trim(0)


def lanes() -> int:
    """Floats a vector of this CPU: 16 with AVX-512, 8 with AVX2; 0 where the kernels can't be used."""
    found = library()
    return int(found.kitseg_lanes()) if found else 0


def describe() -> str:
    """What the kernels use here, as a text."""
    found = _compiled()
    none = "none: compiled from other sources, install kitseg again" if found and is_outdated(found) else "none"
    return WIDTHS.get(lanes(), none)


def call(name: str, job: ctypes.Structure, *more: Any) -> None:
    """Run a kernel. Raises ValueError: its buffers are smaller than its sizes say."""
    found = library()
    if found is None or getattr(found, f"kitseg_{name}")(ctypes.byref(job), *map(ctypes.byref, more)):
        raise ValueError(f"the kernel {name} can't be used with these sizes")


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's values are; None for no tensor."""
    return None if tensor is None else tensor.data_ptr()
