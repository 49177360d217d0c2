"""The C++ tokenizer under sanitizers, built without Python (tests/csrc/CMakeLists.txt)."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    # An environment that is not activated keeps its own cmake and ninja off PATH.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])

    def run(*command):
        command = [shutil.which(command[0], path=path) or command[0], *map(str, command[1:])]
        done = subprocess.run(
            command, env={**os.environ, "PATH": path}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def build(sanitizers, target, *arguments):
        folder = tmp_path_factory.mktemp(target)
        options = ["-DLACLIP_PYTHON=OFF", "-DLACLIP_TESTS=ON", f"-DLACLIP_SANITIZE={sanitizers}"]
        run("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *options, "-DCMAKE_CXX_FLAGS=-O1")
        run("cmake", "--build", folder, "--parallel", "2", "--target", target)
        return run(folder / "tests" / "csrc" / target, *arguments)

    return build


def test_random_inputs_under_address_and_undefined_behaviour_sanitizers(build):
    assert build("address,undefined", "fuzz_bpe", 10_000) == "fuzz_bpe: 10000 inputs\n"


def test_eight_threads_under_the_thread_sanitizer(build):
    assert build("thread", "threads_bpe").endswith(" 0 wrong\n")
