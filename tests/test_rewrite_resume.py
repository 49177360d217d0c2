"""kill -9, a full disk, a changed command, two runs at once: no caption is lost or done twice."""

import json
import random
import resource
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter

import loopback
import pyarrow.parquet
import pytest

from laclip.cli import main
from laclip.dataset import open_dataset
from laclip.prepare.tokenize import tokenize
from laclip.rewrite.captions import CaptionShard
from laclip.rewrite.engine import Sampling
from laclip.rewrite.job import Plan, open_folder, rewrite_shards
from laclip.rewrite.prompts import load_prompts
from laclip.rewrite.servers import Servers

SHARDS, CAPTIONS = 4, 120


class Handler(loopback.Handler):
    """A language model of few words, of the caption's alone: equal runs give equal rewrites."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        caption = body["prompt"].split("\n")[-1].removesuffix(" =>")
        time.sleep(0.005 * random.random())
        with self.server.lock:
            self.server.asked[caption] += 1
            full = self.server.asked.total() >= self.server.most
        if full:
            self.server.killed.wait(300)
        text = "Sure! Here it is: x" if "7" in caption else f"seen: {caption}, {body['seed']}"
        answer = {"choices": [{"text": text}], "usage": {"completion_tokens": 3}}
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server():
    """A server; once it was asked `most` times it answers no more until `killed` is set."""
    own = {"asked": Counter(), "lock": threading.Lock()}
    with loopback.serving(Handler, **own, most=float("inf"), killed=threading.Event()) as server:
        yield server


@pytest.fixture
def captions(tmp_path):
    folder = tmp_path / "captions"
    folder.mkdir()
    for shard in range(SHARDS):
        lines = [{"key": f"{shard}-{i}", "caption": f"cap {shard} {i}"} for i in range(CAPTIONS)]
        lines[5]["caption"] = "12:30"  # no letters
        lines[9]["key"] = lines[8]["key"]
        (folder / f"{shard}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def words(captions, out, server, *more):
    given = ["rewrite", captions, out, "--server", server.url, "--model", "m", "--in-flight", 8]
    return list(map(str, [*given, *more]))


def results(out):
    files = [*(out / "shards").iterdir(), *(out / "rejects").iterdir(), out / "rewrites.jsonl"]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def counts(out):
    entries = [json.loads(line) for line in (out / "finished.jsonl").open()]
    return sorted(({**entry, "seconds": 0} for entry in entries), key=lambda e: e["shard"])


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_not(server, captions, tmp_path):
    assert main(words(captions, tmp_path / "whole", server)) == 0
    server.asked.clear()
    out, kills = tmp_path / "killed", 0
    command = [sys.executable, "-m", "laclip.cli", *words(captions, out, server)]
    while True:
        server.killed.clear()
        server.most = server.asked.total() + 100
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None and server.asked.total() < server.most:
            time.sleep(0.001)
        process.kill()
        code = process.wait()
        server.killed.set()
        if code == 0:
            break
        kills += 1
        assert kills < 20
    assert kills >= 4
    assert results(out) == results(tmp_path / "whole")
    assert counts(out) == counts(tmp_path / "whole")
    assert not list((out / "parts").iterdir())
    # Asked for twice is only what was under way when a run was killed: at most twice --in-flight.
    assert server.asked.total() <= SHARDS * (CAPTIONS - 2) + 16 * kills


@pytest.mark.parametrize("left", [[], [".lock"], [".lock", ".job.json.tmp"], ["job.json"]])
def test_a_run_that_was_killed_as_it_began_starts(left, server, captions, tmp_path):
    assert main(words(captions, tmp_path / "whole", server)) == 0
    out = tmp_path / "out"
    out.mkdir()
    for name in left:
        (out / name).write_bytes((tmp_path / "whole" / "job.json").read_bytes())
    assert main(words(captions, out, server)) == 0
    assert results(out) == results(tmp_path / "whole")


def test_every_caption_is_counted_once_with_its_reason(server, captions, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(words(captions, out, server)) == 0
    chatter = sum("7" in str(i) for i in range(CAPTIONS))
    for entry in counts(out):
        assert entry["captions"] == CAPTIONS and entry["duplicate_keys"] == 1
        assert entry["rejected"] == {"chatter": chatter, "unfit": 1}
        assert entry["accepted"] == CAPTIONS - 2 - chatter
        assert entry["tokens"] == 3 * (CAPTIONS - 2)
    rewrites = [json.loads(line) for line in (out / "rewrites.jsonl").open()]
    assert len({entry["key"] for entry in rewrites}) == len(rewrites)
    assert rewrites[0]["source"] == "cap 0 0" and rewrites[0]["text"].startswith("seen: cap 0 0, ")
    assert {"model": "m", "prompts": "plain", "seed": 0}.items() <= rewrites[0].items()
    rejects = [json.loads(line) for line in (out / "rejects" / "0.jsonl").open()]
    expected = {"key": "0-5", "text": "", "source": "12:30", "reason": "unfit"}
    assert rejects[0] == expected | {"model": "m", "prompts": "plain", "seed": 0}
    printed = capsys.readouterr().out
    assert f"{SHARDS * chatter} rejected, chatter" in printed
    assert f"{SHARDS} captions left out: a key" in printed


def test_a_finished_run_asks_for_nothing_when_it_is_started_again(server, captions, tmp_path):
    out = tmp_path / "out"
    assert main(words(captions, out, server)) == 0
    before, asked = results(out), server.asked.total()
    assert main(words(captions, out, server)) == 0
    assert (results(out), server.asked.total()) == (before, asked)


def test_parquet_holds_what_jsonl_holds(server, captions, tmp_path):
    out = tmp_path / "out"
    assert main(words(captions, out, server)) == 0
    assert main(words(captions, out, server, "--parquet")) == 0
    lines = [json.loads(line) for line in (out / "rewrites.jsonl").open()]
    assert pyarrow.parquet.read_table(out / "rewrites.parquet").to_pylist() == lines


def test_a_full_disk_ends_the_run_and_the_next_one_goes_on(server, captions, tmp_path):
    assert main(words(captions, tmp_path / "whole", server)) == 0
    out = tmp_path / "full"
    command = [sys.executable, "-m", "laclip.cli", *words(captions, out, server)]

    def limit():  # no file beyond 9,000 bytes: a write there fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))

    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 1 and "File too large" in done.stderr, done.stderr
    assert str(out) in done.stderr
    assert "Traceback" not in done.stderr
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    assert results(out) == results(tmp_path / "whole")


def test_a_line_that_was_cut_off_is_asked_for_again(server, captions, tmp_path):
    assert main(words(captions, tmp_path / "whole", server)) == 0
    out = tmp_path / "out"
    assert main(words(captions, out, server)) == 0
    # As if the power had failed while the last shard was at work.
    part = out / "parts" / "3.jsonl"
    entry = {"n": 0, "key": "3-0", "text": "kept as it is", "source": "cap 3 0", "tokens": 3}
    part.write_bytes(json.dumps(entry).encode() + b'\n{"n": 1, "key": "3-')
    (out / "shards" / "3.jsonl").unlink()
    with (out / "finished.jsonl").open("a") as file:
        file.write('{"shard": "3", "cap')
    assert main(words(captions, out, server)) == 0
    whole = (tmp_path / "whole" / "shards" / "3.jsonl").read_text().splitlines()
    found = (out / "shards" / "3.jsonl").read_text().splitlines()
    assert json.loads(found[0])["text"] == "kept as it is"
    assert found[1:] == whole[1:]
    assert counts(out)[-1]["shard"] == "3"


def test_the_end_of_a_large_shard_holds_little_of_it_in_memory(tmp_path):
    count, text = 10_000, 3000 * "x"
    (tmp_path / "a.txt").write_text("a caption\n" * count)
    (tmp_path / "out").mkdir()
    open_folder(tmp_path / "out", {})
    with (tmp_path / "out" / "parts" / "a.jsonl").open("w") as part:
        for n in random.Random(0).sample(range(count), count):
            entry = {"n": n, "key": str(n), "text": text, "source": "a caption", "tokens": 1}
            part.write(json.dumps(entry | ({"reason": "echo"} if n % 10 == 0 else {})) + "\n")
    engine = Servers(["http://localhost:1/v1"], "m", Sampling(load_prompts("plain")))
    tracemalloc.start()
    try:
        plan = Plan(tmp_path / "out", "m", 0)
        (result,) = rewrite_shards([CaptionShard(tmp_path / "a.txt")], plan, engine)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < count * len(text) / 3
    assert (result["accepted"], result["rejected"]) == (count * 9 // 10, {"echo": count // 10})
    for name, rejected in (("shards", False), ("rejects", True)):
        lines = (tmp_path / "out" / name / "a.jsonl").open()
        keys = [json.loads(line)["key"] for line in lines]
        assert keys == [str(n) for n in range(count) if (n % 10 == 0) == rejected]


@pytest.mark.parametrize("change", [("--seed", 1), ("--prompts", "brief"), ("--max-tokens", 9)])
def test_another_command_in_the_same_folder_is_refused(change, server, captions, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(words(captions, out, server)) == 0
    before = results(out)
    assert main(words(captions, out, server, *change)) == 2
    assert "holds another run" in capsys.readouterr().err
    assert results(out) == before


def test_changed_captions_and_a_foreign_folder_are_refused(server, captions, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(words(captions, out, server)) == 0
    with (captions / "1.jsonl").open("a") as file:
        file.write('\n{"key": "new", "caption": "a new one"}\n')
    assert main(words(captions, out, server)) == 2
    assert "files: " in capsys.readouterr().err
    assert main(words(captions, captions, server)) == 2
    assert "no job.json" in capsys.readouterr().err


def test_captions_in_another_order_do_not_take_each_others_rewrites(
    server, captions, tmp_path, capsys
):
    out, path = tmp_path / "out", captions / "3.jsonl"
    assert main(words(captions, out, server)) == 0
    entry = {"n": 0, "key": "3-0", "text": "seen", "source": "cap 3 0", "tokens": 3}
    (out / "parts" / "3.jsonl").write_text(json.dumps(entry) + "\n")  # as a kill would leave it
    (out / "shards" / "3.jsonl").unlink()
    path.write_text("\n".join(reversed(path.read_text().split("\n"))))
    assert main(words(captions, out, server)) == 1
    assert "set aside: 3: " in capsys.readouterr().out
    path.write_text("\n".join(reversed(path.read_text().split("\n"))))
    assert main(words(captions, out, server)) == 0
    (again,) = [
        e for e in map(json.loads, (out / "shards" / "3.jsonl").open()) if e["key"] == "3-0"
    ]
    assert again["text"] == "seen"


def test_two_runs_in_one_folder_are_kept_apart(server, captions, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "laclip.cli", *words(captions, out, server)]
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, stdout=-3) for _ in "ab"]
    said = [run.communicate()[1] for run in runs]
    codes = sorted(run.returncode for run in runs)
    assert codes in ([0, 0], [0, 2])  # one after the other, or the second refused
    assert codes == [0, 0] or "another run is at work" in "".join(said)
    assert server.asked.total() == SHARDS * (CAPTIONS - 2)


def test_tokenize_takes_the_rewrites_of_a_dataset_as_they_are(server, emoji_copy, tmp_path):
    out = tmp_path / "out"
    more = ("--in-flight", 32)
    assert main(words(emoji_copy, out, server, *more)) == 0
    report = tokenize(emoji_copy, {"llm": out / "rewrites.jsonl"})
    dataset = open_dataset(emoji_copy)
    entries = [json.loads(line) for line in (out / "finished.jsonl").open()]
    accepted = sum(entry["accepted"] for entry in entries)
    assert "llm" in dataset.variants
    (line,) = [line.split() for line in report.splitlines() if line.split()[0] == "llm"]
    assert accepted > 0.9 * dataset.num_samples
    assert int(line[1]) == dataset.num_samples - accepted  # missing ones fall back in training
    assert int(line[5]) == 0  # none unmatched
