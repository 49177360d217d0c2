"""Rewriting by every engine at hand: captions and tokens a second, and what the filters accept.

python benchmarks/rewrite.py                                       EDA, Apertium, the client alone
python benchmarks/rewrite.py --model SmolLM2-135M-Instruct.Q4_1.gguf         engine transformers
python benchmarks/rewrite.py --server 'llama.cpp=http://localhost:8000/v1' --served NAME

A server is started by hand; on a GPU:

vllm serve meta-llama/Llama-3.1-8B --port 8000 --enable-prefix-caching
python benchmarks/rewrite.py --server vllm=http://localhost:8000/v1 \
    --served meta-llama/Llama-3.1-8B --captions 20000 --in-flight 512

Captions are names of the embedded data, of three words and more. Seconds are those that `laclip
rewrite` itself counts, from its first question to the last answer, without loading a model.
`client` asks an nginx that answers at once, so it is what laclip can ask for at most.
"""

import argparse
import json
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

from harness import ROOT, Record, append, facts, table

from laclip.rewrite.captions import open_captions
from laclip.rewrite.prompts import BUILT_IN

MANY = 20_000  # captions for what takes less than a millisecond each
ANSWER = {
    "choices": [
        {"index": 0, "text": " a calm lake reflects an orange sky", "finish_reason": "stop"}
    ],
    "usage": {"prompt_tokens": 150, "completion_tokens": 9, "total_tokens": 159},
}
NGINX = """
worker_processes 1; daemon off; pid {folder}/pid; error_log {folder}/errors;
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_requests 1000000000; client_body_temp_path {folder}/bodies;
  server {{
    listen 127.0.0.1:{port} backlog=4096; default_type application/json;
    location / {{ return 200 '{answer}'; }}
  }}
}}
"""


def write_captions(path: Path, count: int) -> Path:
    """So many captions of the embedded data; it begins again, with other keys, where it ends."""
    shards = open_captions(ROOT / "examples" / "emoji" / "train")
    found = [item for shard in shards for item in shard.read() if len(item[1].split()) > 2]
    lines = (
        json.dumps({"key": f"{number}-{key}", "caption": caption})
        for number, (key, caption) in enumerate(islice(cycle(found), count))
    )
    path.write_text("\n".join(lines))
    return path


def measure(
    name: str, captions: Path, words: list, *, model: str = "", repeats: int = 1, **shape: int
) -> Record:
    """One command of `laclip rewrite`, as a record."""
    runs, processor = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "laclip.cli", "rewrite", captions, folder, *words]
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(f"{' '.join(map(str, command))}: exit code {done.returncode}")
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            runs.append(json.loads((Path(folder) / "finished.jsonl").read_text()))
            processor.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        print(f"{name}: {runs[-1]}", file=sys.stderr)
    run, seconds = runs[-1], sorted(entry["seconds"] for entry in runs)
    middle = statistics.median(seconds)
    extra = {
        "model": model,
        "tokens_a_second": run["tokens"] / middle,
        "tokens_a_caption": run["tokens"] / run["captions"],
        "cpu_seconds_in_all": statistics.median(processor),
        "accepted": run["accepted"] / run["captions"],
        "rejected": run["rejected"],
    }
    shape = {"captions": run["captions"], **shape}
    times = [1e3 * value for value in (middle, seconds[0], seconds[-1])]
    rate = run["captions"] / middle
    return Record(
        *("rewriting", name, shape, "-", *times, repeats, rate, "captions/s", None, None, extra),
        **facts("cpu"),
    )


def measure_client(folder: Path, captions: Path) -> list[Record]:
    """`laclip rewrite` against a server that takes no time to speak of."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = folder / "nginx.conf"
    settings.write_text(NGINX.format(folder=folder, port=port, answer=json.dumps(ANSWER)))
    server = subprocess.Popen(["nginx", "-c", settings])
    time.sleep(1)
    words = ["--server", f"http://127.0.0.1:{port}/v1", "--model", "none", "--in-flight"]
    try:
        return [
            measure("client", captions, [*words, in_flight], repeats=3, in_flight=in_flight)
            for in_flight in (16, 64, 512)
        ]
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a folder or .gguf file for the engine transformers")
    parser.add_argument("--server", metavar="LABEL=URL", help="a server that runs")
    parser.add_argument("--served", help="the server's name of its model")
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--captions", type=int, default=50, help="for a model (default: 50)")
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--prompts", nargs="+", default=list(BUILT_IN))
    parser.add_argument("--encoder", help="also measures similarity, within the time")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/rewrite.jsonl")
    options = parser.parse_args()
    more = ["--chat"] if options.chat else []
    more += ["--encoder", options.encoder] if options.encoder else []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not options.model and not options.server:
            many = write_captions(folder / "many.jsonl", MANY)
            records = [measure("EDA", many, ["--method", "eda"], repeats=3)]
            if shutil.which("apertium"):
                words = ["--method", "backtranslate", "--through", "spa"]
                records.append(measure("Apertium, Spanish", many, words, repeats=3))
            records += measure_client(folder, many) if shutil.which("nginx") else []
        else:
            captions = write_captions(folder / "captions.jsonl", options.captions)
            if options.model:
                label, size, model = "transformers", options.batch_size, Path(options.model).name
                words = ["--engine", "transformers", "--model", options.model, "--batch-size", size]
                shape = {"batch_size": size}
            else:
                (label, url), model = options.server.split("=", 1), options.served
                words = ["--server", url, "--model", options.served]
                words += ["--in-flight", options.in_flight]
                shape = {"in_flight": options.in_flight}
            label += " chat" if options.chat else ""
            records = [
                measure(
                    f"{label}, {p}", captions, [*words, *more, "--prompts", p], model=model, **shape
                )
                for p in options.prompts
            ]
    append(records, options.out)
    print(table(records))


if __name__ == "__main__":
    main()
