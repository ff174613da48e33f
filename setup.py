"""A thin driver over CMakeLists.txt: it says where the modules go and which options hold.

Environment: ``AMTL_CUDA=auto|on|off``, ``AMTL_TOOLS=on|off`` (the pybind11 test module; on by
default in an editable install, off in a wheel, which stays one file for every Python),
``MAX_JOBS`` (default 2), ``CMAKE_ARGS`` (passed on).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shlex
import subprocess
import sys
import zlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def with_tools() -> dict[str, str]:
    """The environment, with cmake and ninja that pip has installed before all others.

    Nobody needs to have activated a virtual environment for that.
    """
    folders = [os.environ.get("PATH", os.defpath)]
    for name, place in (("cmake", "CMAKE_BIN_DIR"), ("ninja", "BIN_DIR")):
        with contextlib.suppress(ImportError, AttributeError):
            folders.insert(0, getattr(importlib.import_module(name), place))
    return {**os.environ, "PATH": os.pathsep.join(folders)}


class CMakeBuild(build_ext):
    """Builds the one CMake project that holds every native module."""

    in_place = False

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".abi3.so"

    def run(self) -> None:
        # setuptools clears `inplace` while it builds and copies the modules it knows afterwards;
        # CMake writes them where they belong at once, the tool module included.
        self.in_place = bool(self.inplace) or bool(getattr(self, "editable_mode", False))
        super().run()

    def copy_extensions_to_source(self) -> None:
        pass

    def build_extension(self, ext: Extension) -> None:
        in_place = self.in_place
        built = ROOT / "amtl_kernels" / "_C"
        output = (built if in_place else Path(self.get_ext_fullpath(ext.name)).resolve()).parent
        tools = os.environ.get("AMTL_TOOLS", "on" if in_place else "off")
        given = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        # CMake remembers arguments of the build before, so others have a folder of their own.
        others = f"-{zlib.crc32(shlex.join(given).encode()):08x}" if given else ""
        name = "develop" if in_place else f"wheel-{sys.version_info[1]}"
        build = ROOT / "build" / f"{name}{others}"
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{build}",
            "-GNinja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DAMTL_OUTPUT_DIR={output}",
            f"-DAMTL_CUDA={os.environ.get('AMTL_CUDA', 'auto')}",
            f"-DAMTL_TOOLS={tools}",
            *given,
        ]
        jobs = os.environ.get("MAX_JOBS", "2")
        environment = with_tools()
        for command in (configure, ["cmake", "--build", str(build), "--parallel", jobs]):
            subprocess.check_call(command, env=environment)


class StableWheel(bdist_wheel):
    """Tags the wheel for every CPython from 3.10 on: the module uses the limited C API."""

    def finalize_options(self) -> None:
        self.py_limited_api = "cp310"
        super().finalize_options()


setup(
    ext_modules=[Extension("amtl_kernels._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": StableWheel},
)
