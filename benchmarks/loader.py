"""Images a second of laclip's loader and its rivals, on the same photographs, crops and threads.

    python -m pip install --no-deps --target RIVALS webdataset==0.2.86 braceexpand==0.1.7
    PYTHONPATH=RIVALS python benchmarks/loader.py --photos FOLDER --work FOLDER [--out FILE]

--photos: photographs of 500 pixels or more a side, in any number of folders below; --work gets
4,096 JPEGs of 500 x 375 cut from them (once), as files and as webdataset tars.

All give float images of 224 x 224, normalized, from crops of half to all of the area, bicubic and
antialiased, with as many processes as laclip and DALI have threads. The rivals read no captions.
Each turn first takes what was read ahead while the others ran. On a GPU the hardware decoder's
share is swept, and training on real data is set against training on one batch again and again.
"""

import argparse
import io
import itertools
import os
import random
import shutil
import tarfile
import time
from pathlib import Path

import harness
import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
import webdataset
from nvidia.dali.pipeline import pipeline_def
from PIL import Image

from laclip import _native
from laclip.config import PRESETS, DataConfig, ModelConfig, TextConfig, VisionConfig
from laclip.dataset import open_dataset
from laclip.images import NORMALIZATION, ImagePipeline
from laclip.kernels import clip_loss
from laclip.loader import Loader, reader_options, shard_files
from laclip.model import build_model
from laclip.optimizer import build_optimizer
from laclip.prepare.index import index
from laclip.prepare.tokenize import tokenize
from laclip.tokenizer import load_tokenizer

IMAGES, SHARD_IMAGES, SIZE = 4096, 512, 224
SCALE, RATIO = (0.5, 1.0), (3 / 4, 4 / 3)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MEAN, STD = (torch.tensor(values)[:, None, None] for values in NORMALIZATION["openai"])


def build_images(photos, work):
    """Photographs scaled to a random size, cut to 500 x 375 or upright, JPEG quality 90."""
    sources = []
    for path in sorted(photos.rglob("*")):
        if path.suffix.lower() in (".jpg", ".jpeg", ".png"):
            image = Image.open(path).convert("RGB")
            if min(image.size) >= 500 or image.size[0] >= 600:
                image.thumbnail((2000, 2000))
                sources.append(image)
    folder = work / "images.part"  # a call that is cut leaves no half set under its name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number in range(IMAGES):
        rng = random.Random(number)
        image = sources[number % len(sources)]
        width, height = (375, 500) if rng.random() < 0.3 else (500, 375)
        scale = max(width / image.width, height / image.height) * rng.uniform(1, 1.6)
        box_width, box_height = width / scale, height / scale
        x = rng.uniform(0, max(0.0, image.width - box_width))
        y = rng.uniform(0, max(0.0, image.height - box_height))
        box = (x, y, min(x + box_width, image.width), min(y + box_height, image.height))
        cut = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
        cut.save(folder / f"{number:06}.jpg", quality=90)
    folder.rename(work / "images")
    return len(sources)


def build_dataset(work):
    """The images as webdataset tars, indexed and tokenized."""
    paths = sorted((work / "images").glob("*.jpg"))
    folder = work / "shards.part"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for shard, first in enumerate(range(0, len(paths), SHARD_IMAGES)):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for path in paths[first : first + SHARD_IMAGES]:
                tar.add(path, path.name)
                text = f"photograph number {path.stem}".encode()
                info = tarfile.TarInfo(path.stem + ".txt")
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text))
    index(folder)
    tokenize(folder)
    folder.rename(work / "shards")


def random_window(width, height, rng=random):
    """torchvision's RandomResizedCrop."""
    for _ in range(10):
        area = width * height * rng.uniform(*SCALE)
        ratio = np.exp(rng.uniform(*np.log(RATIO)))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            x, y = rng.randint(0, width - w), rng.randint(0, height - h)
            return x, y, x + w, y + h
    return 0, 0, width, height


def pil_transform(image):
    image = image.convert("RGB")
    box = random_window(*image.size)
    image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)
    return pixels.sub_(MEAN).div_(STD)


class Files(torch.utils.data.Dataset):
    def __init__(self, folder):
        self.paths = sorted(folder.glob("*.jpg"))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, number):
        with Image.open(self.paths[number]) as image:
            return pil_transform(image)


def endless(loader):
    while True:
        yield from loader


def pil_loader(work, batch, threads):
    files = Files(work / "images")
    return endless(
        torch.utils.data.DataLoader(
            files,
            batch,
            shuffle=True,
            num_workers=threads,
            drop_last=True,
            persistent_workers=True,
            multiprocessing_context="forkserver",
        )
    )


def webdataset_loader(work, batch, threads):
    tars = [str(path) for path in sorted((work / "shards").glob("*.tar"))]
    samples = webdataset.WebDataset(tars, resampled=True, nodesplitter=None)
    samples = (
        samples.shuffle(1000).decode("pil").to_tuple("jpg").map_tuple(pil_transform).batched(batch)
    )
    return iter(
        webdataset.WebLoader(
            samples, batch_size=None, num_workers=threads, multiprocessing_context="forkserver"
        )
    )


@pipeline_def
def dali_webdataset(tars, share):
    encoded = fn.readers.webdataset(paths=tars, ext=["jpg"], random_shuffle=True, initial_fill=1000)
    gpu = {"device": "mixed", "hw_decoder_load": share} if DEVICE.type == "cuda" else {}
    images = fn.decoders.image_random_crop(
        encoded,
        output_type=types.RGB,
        random_area=SCALE,
        random_aspect_ratio=RATIO,
        adjust_orientation=False,
        **gpu,
    )
    images = fn.resize(
        images, size=[SIZE, SIZE], interp_type=types.DALIInterpType.INTERP_CUBIC, antialias=True
    )
    mean, std = NORMALIZATION["openai"]
    return fn.crop_mirror_normalize(
        images, mean=[255 * m for m in mean], std=[255 * s for s in std], output_layout="CHW"
    )


def dali_loader(work, batch, threads):
    tars = [str(path) for path in sorted((work / "shards").glob("*.tar"))]
    pipeline = dali_webdataset(
        tars,
        0.75,
        batch_size=batch,
        num_threads=threads,
        device_id=0 if DEVICE.type == "cuda" else None,
        prefetch_queue_depth=2,
    )
    pipeline.build()
    while True:
        (output,) = pipeline.run()
        images = torch.empty(batch, 3, SIZE, SIZE, device=DEVICE)
        images.copy_(torch.from_dlpack(output.as_tensor()))
        yield images


def our_loader(folder, batch, threads, **data):
    return Loader(
        [open_dataset(folder)],
        DataConfig(
            crop_scale=SCALE,
            crop_ratio=RATIO,
            reader_threads=1,
            decode_threads=threads,
            **data,
        ),
        load_tokenizer(),
        seed=0,
        global_batch_size=batch,
        image_size=SIZE,
        context_length=77,
        device=DEVICE,
    )


def cpu_seconds():
    """Processor time of this process and all below it."""
    times, parents = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        number = int(path.parent.name)
        parents[number] = int(fields[1])
        times[number] = int(fields[11]) + int(fields[12])
    total = 0
    for number, ticks in times.items():
        above = number
        while above not in (0, os.getpid()):
            above = parents.get(above, 0)
        total += ticks if above else 0
    return total / os.sysconf("SC_CLK_TCK")


def wait_until_idle():
    used = -1.0
    while (now := cpu_seconds()) - used > 0.02:
        used = now
        time.sleep(0.3)


class Decoder:
    """DALI alone: the same batches over and over, already in memory."""

    def __init__(self, folder, batch, threads):
        reader = open_reader(folder, batch)
        self.batches = itertools.cycle([reader.read(k) for k in range(4)])
        self.pipeline = ImagePipeline(
            batch_size=batch, image_size=SIZE, train=True, device=DEVICE, threads=threads
        )
        self.feed()

    def feed(self):
        batch = next(self.batches)
        self.pipeline.feed(batch.images(), batch.windows, batch.mirrors)

    def __next__(self):
        self.feed()
        return self.pipeline.take()


def open_reader(folder, batch, threads=1):
    options = reader_options(DataConfig(reader_threads=threads), load_tokenizer(), 77)
    options.global_batch_size = batch
    options.scale_low, options.scale_high = SCALE
    return _native.BatchReader(shard_files(open_dataset(folder)), options)


def images_case(name, start, batch, lead, images):
    """`images` images of the loader that start(turn) gives, after `lead` batches, which are ahead.

    Processor time is beside the clock's, which a shared machine disturbs more.
    """
    extra = {"CPU ms an image": 0.0}
    used = []

    def prepare(turn):
        wait_until_idle()  # the case before fills its queue again
        loader = start(turn)
        for _ in range(lead):
            next(loader)
        return loader

    def run(loader):
        begin = cpu_seconds()
        for _ in range(images // batch):
            next(loader)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        used.append(cpu_seconds() - begin)
        extra["CPU ms an image"] = float(np.median(used)) / images * 1e3

    return harness.Case(name, run, prepare, images, "images/s", extra=extra)


def reader_case(work, batch, threads):
    reader = open_reader(work / "shards", batch, threads)
    size = sum(path.stat().st_size for path in (work / "images").iterdir()) / IMAGES

    def run(_):
        for _ in range(32):
            reader.next()

    images = 32 * batch
    name = f"reader alone, {threads} thread" + "s" * (threads > 1)
    return harness.Case(name, run, work=images * size, unit="GB/s", divisor=1e9)


def feed_case(work, batch):
    """Python's time to hand DALI a batch that was read."""
    read = open_reader(work / "shards", batch).read(0)
    pipeline = ImagePipeline(batch_size=batch, image_size=SIZE, train=True, device=DEVICE)
    extra = {"own CPU us an image": 0.0}
    used = []

    def prepare(_):
        if used:
            pipeline.take()

    def run(_):
        begin = time.thread_time()
        pipeline.feed(read.images(), read.windows, read.mirrors)
        used.append(time.thread_time() - begin)
        extra["own CPU us an image"] = float(np.median(used)) / batch * 1e6

    return harness.Case("hand DALI a batch", run, prepare, batch, "images/s", extra=extra)


def damage(folder, fresh, every, inside):
    """A copy in which one image in `every` is cut short, or has no valid Huffman table."""
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(folder, fresh)
    dataset, number = open_dataset(fresh), 0
    for shard in range(len(dataset.shards)):
        with dataset.tar_path(shard).open("r+b") as tar:
            for record in dataset.samples(shard).records:
                number += 1
                if number % every == every // 2:
                    tar.seek(int(record["offset"]))
                    content = tar.read(int(record["bytes"]))
                    at = content.index(b"\xff\xc4") + 5 if inside else len(content) * 2 // 3
                    tar.seek(int(record["offset"]) + at)
                    tar.write(b"\xff" * 16 if inside else bytes(len(content) - at))


def failure_cases(work, batch, threads, images, every):
    """A new loader each turn: what one found bad is known to it afterwards."""

    def case(name, folder):
        def start(turn):
            return our_loader(folder, batch, threads, max_bad_fraction=0.5)

        return images_case(name, start, batch, 2, images)

    yield case("no bad image", work / "shards")
    for inside, name in ((False, "cut short"), (True, "broken inside")):
        folder = work / f"bad_{name.split()[0]}"
        damage(work / "shards", folder, every, inside)
        yield case(f"1 in {every} {name}", folder)


def training_cases(work, batch, threads):
    """ViT-B/16 in bf16 on the loader's batches, and on its first batch over and over."""
    preset = PRESETS["vit_b_16"]
    config = ModelConfig(vision=VisionConfig(**preset["vision"]), text=TextConfig(**preset["text"]))
    tokenizer = load_tokenizer()
    model = build_model(config, tokenizer.vocab_size, tokenizer.eot_token).to(DEVICE)
    optimizer = build_optimizer(
        model, learning_rate=1e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2
    )
    ahead = 3
    loader = our_loader(work / "shards", batch, threads, prefetch=ahead)
    first = next(loader)

    def take_ahead(_):  # a third of a turn's batches would be there without being waited for
        for _ in range(ahead):
            next(loader)

    def step(item):
        with torch.autocast("cuda", torch.bfloat16):
            outputs = model(item.images, item.captions)
        clip_loss(*outputs).backward()
        optimizer.step()
        optimizer.zero_grad()

    def nothing(_):
        pass

    sources = (("real", lambda: next(loader), take_ahead), ("synthetic", lambda: first, nothing))
    for name, draw, prepare in sources:

        def run(_, draw=draw):
            for _ in range(10):
                step(draw())

        name = f"ViT-B/16 on {name} data"
        yield harness.Case(name, run, prepare, work=10 * batch, unit="pairs/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, help="folder of photographs (first run)")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for the images made of them"
    )
    parser.add_argument(
        "--out", type=Path, default=harness.ROOT / "benchmarks/results/loader.jsonl"
    )
    parser.add_argument("--batch", type=int, default=512 if DEVICE.type == "cuda" else 128)
    parser.add_argument("--threads", type=int, default=12 if DEVICE.type == "cuda" else 2)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each case, about")
    parser.add_argument(
        "--parts", nargs="+", default=["rivals", "reader", "failures", "gpu"], metavar="PART"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    work, batch, threads = options.work, options.batch, options.threads
    if not (work / "images").exists():
        print(f"{build_images(options.photos, work)} photographs")
    if not (work / "shards").exists():
        build_dataset(work)
    images = 8 * batch
    records = []

    def compare(subject, cases, **more):
        shape = {"batch": batch, "threads": threads, **more}
        measured = harness.compare(
            subject, cases, shape=shape, dtype="fp32", device=DEVICE.type, seconds=options.seconds
        )
        harness.append(measured, options.out)
        records.extend(measured)

    def running(name, loader, lead):
        return images_case(name, lambda turn: loader, batch, lead, images)

    if "rivals" in options.parts:
        loaders = {
            "laclip": (our_loader(work / "shards", batch, threads), 2),
            "laclip's DALI pipeline alone": (Decoder(work / "shards", batch, threads), 1),
            "DALI readers.webdataset": (dali_loader(work, batch, threads), 2),
            "PIL DataLoader": (pil_loader(work, batch, threads), 2 * threads),
            "webdataset + PIL": (webdataset_loader(work, batch, threads), 2 * threads),
        }
        compare("loader", [running(k, v, n) for k, (v, n) in loaders.items()])
    if "reader" in options.parts:
        compare("reader", [reader_case(work, batch, n) for n in (1, 2)])
        compare("Python", [feed_case(work, batch)])
    if "failures" in options.parts:
        every = 512
        compare("failures", failure_cases(work, batch, threads, images, every))
        clean, *bad = records[-3:]
        key = "CPU ms an image"
        for record in bad:
            cost = (record.extra[key] - clean.extra[key]) * every
            share = cost / (10_000 * clean.extra[key])
            print(f"{record.name}: {cost:.0f} CPU ms each, {share:.2%} at 1 in 10,000")
    if "gpu" in options.parts and DEVICE.type == "cuda":
        cases = []
        for share in (0.0, 0.5, 0.65, 0.8, 1.0):
            loader = our_loader(work / "shards", batch, threads, hardware_decoder_share=share)
            cases.append(running(f"hardware share {share}", loader, 2))
        compare("hardware decoder", cases)
        compare("training", training_cases(work, batch, threads))
    print(harness.table(records))


if __name__ == "__main__":
    main()
