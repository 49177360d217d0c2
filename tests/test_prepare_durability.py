"""kill -9, a full disk, two builds at once: every file is the old or the new one, whole."""

import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tarfile
import time

import pytest
from PIL import Image

from laclip.dataset import open_dataset
from laclip.prepare import shards
from laclip.prepare.folder import samples_summary
from laclip.prepare.index import index
from laclip.prepare.shards import run_shards
from laclip.prepare.tokenize import JOURNAL, tokenize
from laclip.prepare.verify import verify

SHARDS, SAMPLES = 6, 400


def command(*words):
    return [sys.executable, "-m", "laclip.cli", *map(str, words)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Six tars and two files of rewrites; what a clean run makes of them."""
    root = tmp_path_factory.mktemp("source")
    folder = root / "tars"
    folder.mkdir()
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "JPEG")
    rng = random.Random(1)
    words = ["red", "green", "blue", "dog", "cat", "house", "tree", "small", "large", "old"]
    lines = {"a": [], "b": []}
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(SAMPLES):
                key = f"{shard}-{i}"
                caption = " ".join(rng.choices(words, k=8)).encode()
                for extension, data in (("jpg", image.getvalue()), ("txt", caption)):
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                for name, rewrites in lines.items():
                    text = f"{name} " + " ".join(rng.choices(words, k=12))
                    rewrites.append(json.dumps({"key": key, "text": text}) + "\n")
    for name, rewrites in lines.items():
        (root / f"{name}.jsonl").write_text("".join(rewrites))
    old = shutil.copytree(folder, root / "old")
    index(old)
    tokenize(old, {"a": root / "a.jsonl"})
    new = shutil.copytree(old, root / "new")
    tokenize(new, {"a": root / "a.jsonl", "b": root / "b.jsonl"})
    return root


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".tmp"}


def assert_old_or_new(folder, old, new):
    for path in folder.iterdir():
        if path.name == JOURNAL or path.name.endswith(".tmp"):
            continue
        data = path.read_bytes()
        assert data in (old.get(path.name), new.get(path.name)), path.name


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_killed_run_leaves_whole_files_and_the_next_completes(jobs, source, tmp_path):
    old, new = contents(source / "old"), contents(source / "new")
    folder = shutil.copytree(source / "old", tmp_path / "set")
    run = command("tokenize", folder, "--rewrites", f"b={source / 'b.jsonl'}", "--jobs", jobs)
    states = set()
    journal = folder / JOURNAL
    for attempt in range(10):
        before = journal.stat().st_size if journal.exists() else 0
        process = subprocess.Popen(run, stdout=subprocess.DEVNULL)
        # Some kills before the work begins, the others when a first shard is on its way.
        while attempt % 3 and process.poll() is None:
            if journal.exists() and journal.stat().st_size > before:
                break
            time.sleep(0.001)
        time.sleep(0.002 * attempt)
        process.kill()
        process.wait()
        assert_old_or_new(folder, old, new)
        files = contents(folder)
        states.add(sum(files[name] == new[name] for name in new if name.endswith(".captions")))
    assert len(states) > 1, "no kill met the middle of a run"
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
    assert contents(folder) == new
    assert verify(folder) == []


def test_a_killed_index_leaves_whole_files_and_the_next_completes(source, tmp_path):
    folder = shutil.copytree(source / "tars", tmp_path / "set")
    expected = shutil.copytree(source / "tars", tmp_path / "expected")
    index(expected)
    whole = contents(expected)
    run = command("index", folder, "--force", "--jobs", 1)
    for attempt in range(5):
        process = subprocess.Popen(run, stdout=subprocess.DEVNULL)
        while process.poll() is None and not list(folder.glob("*.samples")):
            time.sleep(0.001)
        time.sleep(attempt * 0.002)
        process.kill()
        process.wait()
        assert_old_or_new(folder, {}, whole)
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
    assert contents(folder) == whole


@pytest.mark.parametrize("limit", [10_000, 90_000])
def test_a_full_disk_leaves_whole_files_and_no_rubbish(limit, source, tmp_path):
    """A limit on the size of files, which fails in the middle of a write as a full disk does."""
    old, new = contents(source / "old"), contents(source / "new")
    folder = shutil.copytree(source / "old", tmp_path / "set")
    run = command("tokenize", folder, "--rewrites", f"b={source / 'b.jsonl'}", "--jobs", 1)

    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    result = subprocess.run(run, preexec_fn=limit_files, capture_output=True, text=True)
    assert result.returncode != 0 and "File too large" in result.stderr
    assert_old_or_new(folder, old, new)
    assert not list(folder.glob("*.tmp")) and not list(folder.glob(".*.tmp"))
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
    assert contents(folder) == new


def test_two_equal_builds_at_once_end_whole(source, tmp_path):
    new = contents(source / "new")
    folder = shutil.copytree(source / "tars", tmp_path / "set")
    index(folder)
    files = [f"{name}={source / name}.jsonl" for name in "ab"]
    run = command("tokenize", folder, "--jobs", 1, "--rewrites", files[0], "--rewrites", files[1])
    both = [subprocess.Popen(run, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert contents(folder) == new


def test_shards_that_are_indexed_meanwhile_are_not_lost(source, tmp_path, monkeypatch):
    folder = shutil.copytree(source / "tars", tmp_path / "set")
    last = (folder / f"{SHARDS - 1}.tar").rename(tmp_path / "last.tar")
    index(folder)

    def index_meanwhile(path):
        shutil.copy(last, folder / f"{SHARDS - 1}.tar")
        index(folder)
        return samples_summary(path)

    monkeypatch.setattr("laclip.prepare.tokenize.samples_summary", index_meanwhile)
    with pytest.raises(ValueError, match="changed it meanwhile. Run laclip tokenize again"):
        tokenize(folder)
    assert len(open_dataset(folder).shards) == SHARDS
    monkeypatch.undo()
    tokenize(folder)
    assert open_dataset(folder).num_samples == SHARDS * SAMPLES and verify(folder) == []


def test_a_variant_that_is_added_meanwhile_is_not_lost_without_a_word(
    source, tmp_path, monkeypatch
):
    folder = shutil.copytree(source / "tars", tmp_path / "set")
    index(folder)

    def tokenize_meanwhile(*arguments):
        monkeypatch.undo()
        tokenize(folder, {"a": source / "a.jsonl"})
        return {}

    monkeypatch.setattr("laclip.prepare.tokenize._read_journal", tokenize_meanwhile)
    with pytest.raises(ValueError, match="changed it meanwhile. Run laclip tokenize again"):
        tokenize(folder, {"b": source / "b.jsonl"})
    with pytest.raises(ValueError, match="Name the files of all variants again"):
        tokenize(folder, {"b": source / "b.jsonl"})
    tokenize(folder, {name: source / f"{name}.jsonl" for name in "ab"})
    assert contents(folder) == contents(source / "new")


def test_two_different_builds_at_once_never_mix(source, tmp_path):
    """What is opened afterwards holds the variant that it names, in every shard, or is refused."""
    for _ in range(3):
        folder = shutil.copytree(source / "tars", tmp_path / "set")
        index(folder)
        both = [
            subprocess.Popen(
                command("tokenize", folder, "--jobs", 1, "--rewrites", f"{n}={source / n}.jsonl"),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for n in "ab"
        ]
        for process in both:
            process.wait()
        dataset = open_dataset(folder)
        if dataset.variants:
            expected = {name: tokens_of(source, name) for name in dataset.variants[1:]}
            for shard in range(SHARDS):
                try:
                    captions = dataset.captions(shard)
                except ValueError as error:
                    assert "Run: laclip tokenize" in str(error)
                    continue
                for variant, name in enumerate(dataset.variants[1:], 1):
                    assert captions.tokens(0, variant).tolist() == expected[name][shard]
        tokenize(folder, {n: source / f"{n}.jsonl" for n in "ab"}, drop=())
        assert verify(folder) == []
        shutil.rmtree(folder)


def tokens_of(source, name):
    dataset = open_dataset(source / "new")
    variant = dataset.variants.index(name)
    return [dataset.captions(shard).tokens(0, variant).tolist() for shard in range(SHARDS)]


def test_a_killed_worker_is_told_without_a_traceback():
    with pytest.raises(ChildProcessError, match="killed, .* fewer --jobs"):
        list(run_shards(os._exit, [(9,)] * 3, total=3, label="die", jobs=2))


def test_the_time_left_is_that_of_the_work_that_is_left(monkeypatch, capsys):
    """Nine of twelve tasks were done before; the tenth takes 90 seconds, so will the others."""
    clock = iter([0.0, *[0.5] * 9, 90.5])
    monkeypatch.setattr(shards.time, "monotonic", lambda: next(clock))
    progress = shards._Progress("index", 12, "shards")
    for amount in [0.0] * 9 + [2.0]:
        progress.add(amount, "GB")
    assert capsys.readouterr().err == "index: 10/12 shards, 0.02 GB/s, 0:03:01 left\n"
