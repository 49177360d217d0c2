"""Fixtures shared by several test files."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))  # engine_ranks and train_job, which several tests share
EMOJI = ROOT / "examples" / "emoji"
# How long an example takes says something about the machine alone.
settings.register_profile(
    "laclip", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("laclip")


@pytest.fixture
def emoji_copy(tmp_path):
    """A copy of the embedded training set that a test may damage."""
    folder = tmp_path / "train"
    shutil.copytree(EMOJI / "train", folder)
    return folder


@pytest.fixture(scope="session")
def drawings():
    """24 things that two vendors draw: {caption: {key: JPEG}}."""
    from scored_model import pairs

    return pairs(24)


@pytest.fixture(scope="session")
def trained(drawings, tmp_path_factory):
    """The folder of a run with a small model that has learned them."""
    from scored_model import write_run

    return write_run(tmp_path_factory.mktemp("runs") / "trained", drawings=drawings)


def install(pins):
    """The folder with the packages of a file of pins, which are installed beside the environment
    on first use."""
    spec = importlib.util.spec_from_file_location("oracles", ROOT / "requirements" / "oracles.py")
    oracles = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(oracles)
    oracles.PINS = ROOT / "tests" / "data" / pins
    return oracles.install()


@pytest.fixture(scope="session")
def wordnet():
    """The folder of WordNet as Debian has it: installed, or its package unpacked."""
    # Here, so that tests of the kernels run where laclip's extension is not built.
    from laclip.rewrite.wordnet import FOLDER

    if (FOLDER / "data.noun").exists():
        return FOLDER
    cache = ROOT / ".venv" / "wordnet"
    if not cache.exists():
        cache.parent.mkdir(exist_ok=True)
        apt_get = ["apt-get", "-q", "-o", "Acquire::Retries=5"]
        fresh = Path(tempfile.mkdtemp(prefix="wordnet-", dir=cache.parent))
        subprocess.run([*apt_get, "update"], check=True)
        subprocess.run([*apt_get, "download", "wordnet-base"], cwd=fresh, check=True)
        (package,) = fresh.glob("*.deb")
        subprocess.run(["dpkg", "-x", package, fresh], check=True)
        fresh.rename(cache)  # whole, or not at all
    return cache / "usr" / "share" / "wordnet"


@pytest.fixture(scope="session")
def packages():
    """The folder with transformers and a small language model."""
    return install("rewrite_packages.txt")


@pytest.fixture(scope="session")
def environment(packages):
    """Variables of a process that uses them."""
    more = {"PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    # Without a GPU: in bf16 a batch's padding may change which token is drawn.
    return {**os.environ, **more, "TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="session")
def ray_environment():
    """Variables of a process that can import Ray."""
    more = {"PYTHONPATH": str(install("ray.txt")), "RAY_USAGE_STATS_ENABLED": "0"}
    return {**os.environ, **more}


@pytest.fixture(scope="session")
def wandb_packages():
    """The folder with Weights & Biases."""
    return install("wandb.txt")


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
        # The sanitizers want fixed places in memory, which some kernels' random ones take.
        fixed = ["setarch", "--addr-no-randomize"]
        if not shutil.which("setarch") or subprocess.run([*fixed, "true"]).returncode:
            fixed = []  # containers may forbid it
        return run(*fixed, folder / "tests" / "csrc" / target, *arguments)

    return build
