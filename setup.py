"""Which packages ship: all of kitseg, and ``conf`` as ``kitseg.conf``; its kernels; everything else: pyproject.toml."""

from pathlib import Path
from zlib import crc32

from setuptools import Extension, find_packages, setup

NATIVE = Path("kitseg/native")
SOURCES = sorted(path for path in NATIVE.iterdir() if path.suffix in (".cpp", ".h"))
kernels = Extension(  # a plain shared library that ctypes loads: it needs no Python headers and serves every version
    "kitseg.native.kernels",
    [str(NATIVE / "kernels.cpp")],
    depends=[str(path) for path in SOURCES],
    define_macros=[("KITSEG_SOURCES", f"kitseg_sources_{crc32(b''.join(path.read_bytes() for path in SOURCES)):08x}")],
    extra_compile_args=["-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-g0"],
    extra_link_args=["-pthread"],
    language="c++",
    py_limited_api=True,
    optional=True,  # without a compiler kitseg works too, see kitseg --version
)
setup(
    packages=[*find_packages(include=["kitseg*"]), "kitseg.conf"],
    package_dir={"kitseg": "kitseg", "kitseg.conf": "conf"},
    ext_modules=[kernels],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
