"""laclip pack, index, tokenize and verify on a Ray cluster: the same files as without one."""

import csv
import io
import subprocess
import sys

import numpy as np
from PIL import Image

from laclip.cli import main

ROWS = 60
# Two commands in one process share a cluster, as they would share one that users keep up.
RUN = """
import sys
import ray
from laclip.cli import main
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
codes = []
for words in " ".join(sys.argv[1:]).split(" , "):
    codes.append(main(words.split(" ") + ["--ray"]))
print("codes", *codes)
"""


def write_release(folder):
    """What the LaCLIP release has: a CSV of image paths and captions, and rewrites line by line."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    with open(folder / "original.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filepath", "title"])
        for row in range(ROWS):
            image = Image.fromarray(rng.integers(0, 255, (9, 12, 3), np.uint8))
            data = io.BytesIO()
            image.save(data, "JPEG")
            if row % 17 != 5:  # links rot: these rows have no image
                (folder / "images" / f"{row}.jpg").write_bytes(data.getvalue())
            writer.writerow([f"{row}.jpg", f'picture {row}, "quoted"\nwith a second line'])
    for name in ("chatgpt", "bard"):
        text = "".join(f"{name} says picture number {row}\n" for row in range(ROWS))
        (folder / f"{name}.txt").write_text(text)


def test_a_cluster_writes_the_same_files(ray_environment, tmp_path):
    write_release(tmp_path)

    def commands(out):
        release = f"--original-csv {tmp_path}/original.csv"
        rewrites = " ".join(f"--rewrites {n}={tmp_path}/{n}.txt" for n in ("chatgpt", "bard"))
        images = f"--pairs {tmp_path}/original.csv --images {tmp_path}/images"
        return [
            f"pack {out} {images} --rows 8",
            f"index {out} --decode",
            f"tokenize {out} {release} {rewrites}",
            f"verify {out}",
        ]

    for command in commands(tmp_path / "alone"):
        assert main([*command.split(" "), "--jobs", "1"]) == 0
    run = subprocess.run(
        [sys.executable, "-c", RUN, *" , ".join(commands(tmp_path / "cluster")).split(" ")],
        env=ray_environment, cwd=tmp_path, timeout=900, capture_output=True, text=True,
    )  # fmt: skip
    assert "codes 0 0 0 0" in run.stdout, run.stdout + run.stderr[-3000:]
    files = sorted(path.name for path in (tmp_path / "alone").iterdir())
    assert sum(name.endswith(".captions") for name in files) == -(-ROWS // 8)
    assert files == sorted(path.name for path in (tmp_path / "cluster").iterdir())
    for name in files:
        found = (tmp_path / "cluster" / name).read_bytes()
        assert found == (tmp_path / "alone" / name).read_bytes(), name

    # A shard that breaks is named by the worker's own error, and the others are done.
    (tmp_path / "cluster" / "00003.tar").write_bytes(b"no tar" * 200)
    broken = [f"index {tmp_path / 'cluster'}"]
    run = subprocess.run(
        [sys.executable, "-c", RUN, *broken],
        env=ray_environment, cwd=tmp_path, timeout=900, capture_output=True, text=True,
    )  # fmt: skip
    assert "codes 2" in run.stdout and "00003.tar" in run.stderr, run.stdout + run.stderr[-3000:]
