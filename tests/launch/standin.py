"""Triton's own JIT and launcher over a driver that checks and does nothing: import it before them.

`driver.c` beside this file says what is checked. CPU tensors stand for CUDA tensors.
"""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

if os.environ.get("TRITON_INTERPRET") == "1":
    raise ImportError(
        "kernels are interpreted in this process: run `pytest tests/launch` by itself"
    )
if importlib.util.find_spec("triton") is None:
    raise ImportError("triton is not installed")
COMPILER = os.environ.get("CC") or shutil.which("cc")
if COMPILER is None:
    raise ImportError("no C compiler to build the stand-in driver with")

FOLDER = tempfile.TemporaryDirectory(prefix="sparsekern-driver-")


def _built():
    """The stand-in driver, loaded in place of NVIDIA's."""
    triton = Path(importlib.util.find_spec("triton").origin).parent
    headers = triton / "backends" / "nvidia" / "include"
    library = Path(FOLDER.name) / "libcuda.so.1"
    flags = ["-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", f"-I{headers}"]
    source = Path(__file__).with_name("driver.c")
    subprocess.run([COMPILER, *flags, "-o", str(library), str(source)], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = FOLDER.name
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


LIBRARY = _built()

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia import driver as nvidia  # noqa: E402


class Driver(nvidia.CudaDriver):
    """A Hopper GPU: device 0, which torch need not know."""

    def __init__(self):
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher
        self.stream = 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device):
        return self.stream

    def get_device_capability(self, _device=0):
        return 9, 0


DRIVER = Driver()
triton.runtime.driver.set_active(DRIVER)


class _Last(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_char * 128),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_uint64),
        ("parameters", ctypes.c_int),
        ("size", ctypes.c_uint * 64),
        ("bytes", ctypes.c_ubyte * (64 * 128)),
    )


class Launch(NamedTuple):
    """What the driver was handed."""

    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int
    parameters: tuple[bytes, ...]


def launches():
    """How many launches the driver has taken."""
    return ctypes.c_long.in_dll(LIBRARY, "standin_launches").value


def last():
    """The last launch."""
    seen = _Last.in_dll(LIBRARY, "standin_last")
    data, parameters = bytes(seen.bytes), []
    for size in seen.size[: seen.parameters]:
        parameters.append(data[:size])
        data = data[size:]
    sizes = tuple(seen.grid), tuple(seen.block), seen.shared, seen.stream
    return Launch(seen.kernel.decode(), *sizes, tuple(parameters))
