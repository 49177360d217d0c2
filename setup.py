"""Builds laclip._native from csrc/ with CMake and maps kernels/ to laclip.kernels."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        if shutil.which("c++") is None and shutil.which("g++") is None:
            sys.exit(
                "laclip needs a C++20 compiler to build laclip._native, and found neither c++ nor "
                "g++ on PATH. Install g++ 11 or newer (Debian: apt-get install g++)."
            )
        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}",
        ]
        # pip does not put an unactivated environment's own cmake and ninja on PATH.
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        for command in (configure, ["cmake", "--build", str(build)]):
            try:
                command[0] = shutil.which(command[0], path=path) or command[0]
                subprocess.run(command, check=True, env={**os.environ, "PATH": path})
            except FileNotFoundError:
                sys.exit(f"laclip needs {command[0]} to build: pip install 'cmake>=3.26,<5' ninja")
            except subprocess.CalledProcessError as error:
                sys.exit(
                    f"Building laclip._native failed (code {error.returncode}): the compiler's "
                    "message is above. Needed: a C++20 compiler (g++ 11 or newer) and the headers "
                    f"of Python {sys.version_info.major}.{sys.version_info.minor} "
                    "(Debian: python3-dev)."
                )


setup(
    packages=[
        *("laclip", "laclip.prepare", "laclip.rewrite", "laclip.vocab", "laclip.kernels"),
        *("laclip.evaluation", "laclip.evaluation.names"),
    ],
    package_dir={"laclip": "laclip", "laclip.kernels": "kernels"},
    package_data={"laclip.vocab": ["*"], "laclip.evaluation.names": ["*"]},
    ext_modules=[Extension("laclip._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
