"""Two hosts on one machine: network namespaces, DeepSpeed's node launcher in each, one folder.

sudo python benchmarks/hosts.py   (root: it makes two network namespaces and removes them)

Trains on both to the end and compares with one process; then disturbs the job in several ways and
prints what happens when, in seconds after the disturbance. docs/multi-node.md quotes it.
"""

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from soak_run import ROOT, SETTINGS, steps_done

HOSTS = {"laclip-a": "10.77.0.1", "laclip-b": "10.77.0.2"}
TIMEOUT_MINUTES = 0.25


def shell(command: str) -> None:
    subprocess.run(command.split(), check=True)


@contextlib.contextmanager
def two_hosts():
    first, second = HOSTS
    try:
        for name in HOSTS:
            shell(f"ip netns add {name}")
            shell(f"ip -n {name} link set lo up")
        shell(f"ip link add wire netns {first} type veth peer name wire netns {second}")
        for name, address in HOSTS.items():
            shell(f"ip -n {name} address add {address}/24 dev wire")
            shell(f"ip -n {name} link set wire up")
        yield
    finally:
        for name in HOSTS:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def words(folder: Path, steps: int) -> list[str]:
    found = ["laclip/train.py", "--deepspeed_config", "configs/deepspeed/zero1.json"]
    more = (
        f"run.folder={folder}",
        f"train.steps={steps}",
        f"run.timeout_minutes={TIMEOUT_MINUTES}",
    )
    for setting in (*SETTINGS, *more, "checkpoint.every_steps=1000000"):
        found += ["--set", setting]
    return found


def start(folder: Path, steps: int) -> list[subprocess.Popen]:
    """The node launchers, as `deepspeed --hostfile` starts them on each host."""
    world = base64.urlsafe_b64encode(json.dumps({name: [0] for name in HOSTS}).encode()).decode()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["GLOO_SOCKET_IFNAME"] = "wire"
    log = folder.with_suffix(".log").open("w")
    return [
        subprocess.Popen(
            [
                *("ip", "netns", "exec", name, sys.executable, "-u", "-m"),
                *("deepspeed.launcher.launch", f"--world_info={world}", f"--node_rank={number}"),
                *(f"--master_addr={HOSTS['laclip-a']}", "--master_port=29511"),
                *words(folder, steps),
            ],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
        )
        for number, name in enumerate(HOSTS)
    ]


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def disturb(name: str, folder: Path, action) -> None:
    launchers = start(folder, 10**6)
    while steps_done(folder) < 20:
        assert all(launcher.poll() is None for launcher in launchers), folder
        time.sleep(0.05)
    left = {f"launcher {i}": launcher.pid for i, launcher in enumerate(launchers)}
    left |= {f"rank {i}": children(launcher.pid)[0] for i, launcher in enumerate(launchers)}
    log = folder.with_suffix(".log")
    seen = len(log.read_text())
    print(f"\n{name}")
    begin = time.monotonic()
    action(left)
    while left and time.monotonic() - begin < 120:
        for who in [who for who, pid in left.items() if not alive(pid)]:
            code = launchers[int(who[-1])].poll() if who.startswith("launcher") else None
            print(f"  {time.monotonic() - begin:5.1f} s  {who} has ended"
                  + (f", code {code}" if code is not None else ""))  # fmt: skip
            del left[who]
        text = log.read_text()
        for line in text[seen : text.rfind("\n") + 1].splitlines():
            if line.startswith("laclip: "):
                print(f"  {time.monotonic() - begin:5.1f} s  {line.replace(str(folder), 'RUN')}")
        seen = text.rfind("\n") + 1
        time.sleep(0.02)
    status = json.loads((folder / "status.json").read_text())
    print(f"  status.json: {status['state']}, step {status['step']}, {status['reason']!r}")
    print(f"  left over: {', '.join(left) or 'nothing'}")
    for pid in left.values():
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    for launcher in launchers:
        launcher.wait()


def send(who: str, number: int):
    return lambda left: os.kill(left[who], number)


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary, two_hosts():
        folder = Path(temporary)
        assert [launcher.wait() for launcher in start(folder / "two", 20)] == [0, 0], (
            folder / "two.log"
        ).read_text()
        subprocess.run(
            [sys.executable, *words(folder / "one", 20)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            check=True,
        )
        losses = [
            [json.loads(line)["loss"] for line in (folder / run / "metrics.jsonl").open()]
            for run in ("one", "two")
        ]
        worst = max(abs(a - b) for a, b in zip(*losses))
        print(f"two hosts against one process, 20 steps: losses differ by at most {worst:.1e}")
        disturb("kill -9 of the second host's rank", folder / "a", send("rank 1", signal.SIGKILL))
        disturb("kill -9 of the first host's rank", folder / "b", send("rank 0", signal.SIGKILL))
        disturb("SIGTERM to the second host's launcher", folder / "c",
                send("launcher 1", signal.SIGTERM))  # fmt: skip
        disturb("kill -9 of the second host's launcher", folder / "d",
                send("launcher 1", signal.SIGKILL))  # fmt: skip
        disturb(f"SIGSTOP to the second host's rank, timeout {60 * TIMEOUT_MINUTES:.0f} s",
                folder / "e", send("rank 1", signal.SIGSTOP))  # fmt: skip
        disturb(f"the wire between the hosts is cut, timeout {60 * TIMEOUT_MINUTES:.0f} s",
                folder / "f", lambda _: shell("ip -n laclip-a link set wire down"))  # fmt: skip


if __name__ == "__main__":
    main()
