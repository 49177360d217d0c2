"""Fixtures shared by several test files."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EMOJI = ROOT / "examples" / "emoji"


@pytest.fixture
def emoji_copy(tmp_path):
    """A copy of the embedded training set that a test may damage."""
    folder = tmp_path / "train"
    shutil.copytree(EMOJI / "train", folder)
    return folder


@pytest.fixture(scope="session")
def build_native(tmp_path_factory):
    """build_native(sanitizers, target, *arguments): what a target of tests/csrc prints."""
    # An environment that is not activated keeps its own cmake and ninja off PATH.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])

    def run(*command):
        command = [shutil.which(command[0], path=path) or command[0], *map(str, command[1:])]
        done = subprocess.run(
            command, env={**os.environ, "PATH": path}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    folders = {}

    def build(sanitizers, target, *arguments):
        if sanitizers not in folders:
            folders[sanitizers] = tmp_path_factory.mktemp("build")
        folder = folders[sanitizers]
        options = ["-DLACLIP_PYTHON=OFF", "-DLACLIP_TESTS=ON", f"-DLACLIP_SANITIZE={sanitizers}"]
        run("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *options, "-DCMAKE_CXX_FLAGS=-O1")
        run("cmake", "--build", folder, "--parallel", "2", "--target", target)
        return run(folder / "tests" / "csrc" / target, *arguments)

    return build
