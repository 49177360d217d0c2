"""The batch reader under the thread sanitizer, and when reads fail."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from laclip.dataset import open_dataset

TESTS = Path(__file__).parent
TRAIN = TESTS.parent / "examples" / "emoji" / "train"

READ = f"""
from laclip import _native
from laclip.dataset import open_dataset
from laclip.loader import shard_files
options = _native.ReaderOptions()
options.global_batch_size, options.threads = 64, 1
reader = _native.BatchReader(shard_files(open_dataset({str(TRAIN)!r})), options)
print(sum(reader.next().bytes.tolist()))
"""


CUT = f"""
import torch.distributed as dist
from laclip.parallel import find_ranks
from laclip.watchdog import Watchdog
ranks = find_ranks()
dist.init_process_group("gloo")
with Watchdog(ranks, 60, None, None):
    {READ.replace(str(TRAIN), "TRAIN").strip().replace(chr(10), chr(10) + "    ")}
    open("TRAIN/00000.captions", "r+b").truncate(200)
    for batch in range(9):
        reader.plan(batch)
"""

INHERITED = f"""
import gc, os, sys
import torch
from laclip.config import DataConfig
from laclip.dataset import open_dataset
from laclip.loader import Loader
from laclip.tokenizer import load_tokenizer
loader = Loader(
    [open_dataset({str(TRAIN)!r})], DataConfig(), load_tokenizer(), seed=1, global_batch_size=64,
    image_size=32, context_length=16, device=torch.device("cpu"),
)
next(loader)
child = os.fork()
if child == 0:
    del loader
    gc.collect()
    sys.exit(5)
next(loader)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_process_that_inherits_a_loader_can_free_it():
    done = subprocess.run(
        [sys.executable, "-c", INHERITED], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "5\n", done.stderr


def test_a_sidecar_that_is_cut_while_it_is_mapped_ends_a_run_with_a_word(tmp_path):
    folder = shutil.copytree(TRAIN, tmp_path / "train")
    script = CUT.replace("TRAIN", str(folder))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGBUS and "Fatal Python error: Bus error" in done.stderr


def test_threads_and_ranks_under_the_thread_sanitizer(build_native, tmp_path):
    dataset = open_dataset(TRAIN)
    lines = [
        f"{TRAIN / shard.stem} {shard.samples} {len(dataset.variants)} {shard.samples_checksum} "
        f"{shard.captions_checksum} {dataset.tokenizer}"
        for shard in dataset.shards
    ]
    (tmp_path / "shards").write_text("\n".join(lines))
    printed = build_native("thread", "threads_reader", tmp_path / "shards")
    assert printed == "threads_reader: 240 batches, 0 wrong\n"


@pytest.fixture(scope="module")
def read_with_failures(tmp_path_factory):
    library = tmp_path_factory.mktemp("library") / "fail_reads.so"
    compiler = shutil.which("c++") or shutil.which("g++")
    source = TESTS / "csrc" / "fail_reads.cpp"
    subprocess.run(
        [compiler, "-std=c++20", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True
    )

    def read(reads, opens=0):
        environment = {**os.environ, "LD_PRELOAD": str(library)}
        environment |= {"FAIL_READS": str(reads), "FAIL_OPENS": str(opens)}
        return subprocess.run(
            [sys.executable, "-c", READ], env=environment, capture_output=True, text=True
        )

    return read


def test_what_fails_to_open_or_to_be_read_is_tried_again(read_with_failures):
    clean, *others = (read_with_failures(*counts) for counts in ((0,), (3,), (0, 3)))
    for failing in others:
        assert clean.returncode == failing.returncode == 0, failing.stderr
        assert int(clean.stdout) > 0 and clean.stdout == failing.stdout


def test_a_read_that_keeps_failing_ends_the_run_and_names_the_sample(read_with_failures):
    done = read_with_failures(10**6)
    assert done.returncode != 0
    assert "0000" in done.stderr and ".tar' cannot be read at sample " in done.stderr
    assert "after 5 tries: Input/output error" in done.stderr
