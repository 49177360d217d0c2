"""Shards on a Ray cluster: the same files as without one."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import loopback

from laclip.cli import main

RUN = """
import sys
import ray
from laclip.cli import main
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
sys.exit(main(sys.argv[1:]))
"""


class Handler(loopback.Handler):
    """Answers with the caption's words in reverse; kills the worker that asks for `deadly`."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        caption = body["prompt"].split("\n")[-1].removesuffix(" =>")
        self.server.asked.append(caption)
        if caption == self.server.deadly:
            os.kill(owner_of(self.client_address[1], self.server.server_port), 9)
            self.server.deadly = None
            return
        text = " ".join(reversed(caption.split()))
        data = json.dumps({"choices": [{"text": text}]}).encode()
        time.sleep(0.01)
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def owner_of(port, server_port):
    """The process that holds the client's end of a connection on loopback."""
    wanted = f":{port:04X} 0100007F:{server_port:04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()
    (inode,) = [line.split()[9] for line in lines if wanted in line]
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == f"socket:[{inode}]":
                return int(link.parts[2])
        except OSError:
            continue
    raise LookupError(port)


def test_a_cluster_writes_the_same_files_even_when_a_worker_dies(ray_environment, tmp_path):
    folder = tmp_path / "captions"
    folder.mkdir()
    for shard in range(6):
        lines = "".join(f"caption {i} of shard {shard}\n" for i in range(40))
        (folder / f"{shard}.txt").write_text(lines)
    with loopback.serving(Handler, asked=[], deadly=None) as server:
        words = ["--server", server.url, "--model", "m", "--in-flight", "4"]
        assert main(["rewrite", str(folder), str(tmp_path / "alone"), *words]) == 0
        server.asked.clear()
        server.deadly = "caption 30 of shard 4"
        command = [sys.executable, "-c", RUN, "rewrite", str(folder), str(tmp_path / "cluster")]
        run = subprocess.run(
            [*command, *words, "--ray"], env=ray_environment, cwd=tmp_path, timeout=900,
            capture_output=True, text=True,
        )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    assert server.deadly is None
    for name in ("shards", "rejects"):
        for path in (tmp_path / "alone" / name).iterdir():
            found = tmp_path / "cluster" / name / path.name
            assert found.read_bytes() == path.read_bytes(), path
    whole = (tmp_path / "alone" / "rewrites.jsonl").read_bytes()
    assert (tmp_path / "cluster" / "rewrites.jsonl").read_bytes() == whole
    # The retried shard went on from its part: twice asked is only what was under way.
    assert len(server.asked) <= 240 + 8
