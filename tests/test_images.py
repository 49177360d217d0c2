"""Decoding and augmentation with DALI, held against PIL."""

import io
import re
import struct
import zlib

import numpy as np
import nvidia.dali.types as types
import pytest
import torch
from PIL import Image, ImageOps

from laclip import _native
from laclip import images as images_module
from laclip.images import NORMALIZATION, DecodeError, ImagePipeline

CPU = torch.device("cpu")
FILTERS = {"cubic": Image.Resampling.BICUBIC, "linear": Image.Resampling.BILINEAR}


def levels(images, normalize="openai"):
    """Normalized images back in levels of 255."""
    mean, std = (torch.tensor(v)[:, None, None] for v in NORMALIZATION[normalize])
    return (images * std + mean) * 255


def photograph(width, height, seed):
    """A JPEG with smooth shading, edges and texture, and the picture that PIL decodes from it."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 24, width // 24, 3), dtype=np.uint8))
    picture = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    picture[height // 3 : height // 2, width // 4 : width // 2] //= 2
    picture += rng.integers(-6, 7, picture.shape)
    buffer = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
    return np.frombuffer(buffer.getvalue(), np.uint8), Image.open(buffer).convert("RGB")


@pytest.fixture(params=["ours", "DALI's"])
def resize(request, monkeypatch):
    """On a CPU both: our own resize, and with DALI's CPU operators all that a GPU is given behind
    the decoder."""
    monkeypatch.setattr(images_module, "_dali_resizes", lambda device: request.param == "DALI's")
    return request.param


@pytest.mark.parametrize("interpolation", ["cubic", "linear"])
def test_training_images_are_those_of_pil(interpolation, resize):
    encoded, pictures = zip(*(photograph(400 + 30 * i, 300 + 20 * i, i) for i in range(6)))
    windows = np.array([[7, 11, 350, 260], [0, 0, 100, 200], [50, 60, 224, 224]] * 2, np.int32)
    mirrors = np.array([0, 1] * 3, np.uint8)
    pipeline = ImagePipeline(
        batch_size=6, image_size=224, interpolation=interpolation, train=True, device=CPU
    )
    pipeline.feed(list(encoded), windows, mirrors)
    images = levels(pipeline.take())
    for image, picture, (x, y, w, h), mirror in zip(images, pictures, windows, mirrors):
        expected = picture.crop((x, y, x + w, y + h)).resize((224, 224), FILTERS[interpolation])
        if mirror:
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert difference(image, expected) < 1


@pytest.mark.parametrize("interpolation", ["cubic", "linear"])
def test_evaluation_images_are_those_of_pil(interpolation, resize):
    sizes = ((500, 300), (320, 480), (224, 224), (333, 251), (225, 224), (229, 224), (100, 90))
    sizes += ((24, 2000), (1999, 25))
    encoded, pictures = zip(*(photograph(w, h, w) for w, h in sizes))
    pipeline = ImagePipeline(
        batch_size=len(sizes),
        image_size=224,
        interpolation=interpolation,
        train=False,
        device=CPU,
    )
    pipeline.feed(list(encoded))
    for image, picture in zip(levels(pipeline.take()), pictures):
        expected = evaluation_image(picture, 224, FILTERS[interpolation])
        assert difference(image, expected) < 1


def evaluation_image(picture, side, resample):
    """torchvision's Resize and CenterCrop."""
    size = [int(side * length / min(picture.size)) for length in picture.size]
    x, y = (round((length - side) / 2) for length in size)
    return picture.resize(size, resample).crop((x, y, x + side, y + side))


def difference(image, expected):
    """Mean absolute difference of a [3, side, side] tensor and a PIL image, in levels of 255."""
    return np.abs(image.permute(1, 2, 0).numpy() - np.asarray(expected, np.float32)).mean()


def test_normalization_can_be_imagenets(resize):
    encoded, _ = photograph(300, 300, 0)
    images = []
    for normalize in NORMALIZATION:
        pipeline = ImagePipeline(
            batch_size=1, image_size=64, normalize=normalize, train=False, device=CPU
        )
        pipeline.feed([encoded])
        images.append(levels(pipeline.take(), normalize))
    assert (images[0] - images[1]).abs().max() < 1e-2


@pytest.mark.parametrize("train", [True, False])
def test_what_waits_for_a_gpu_are_bytes(train, monkeypatch):
    monkeypatch.setattr(images_module, "_dali_resizes", lambda device: True)
    pipeline = ImagePipeline(batch_size=1, image_size=32, train=train, device=CPU)
    window = np.array([[5, 5, 40, 50]], np.int32)
    pipeline.feed([photograph(60, 70, 0)[0]], *((window, np.zeros(1, np.uint8)) if train else ()))
    (waiting,) = pipeline._pipeline.outputs()
    assert waiting.as_tensor().shape() == [1, 32, 32, 3]
    assert waiting.dtype == types.UINT8


def test_undecodable_images_are_named_and_the_pipeline_goes_on(resize):
    good = [photograph(200, 150, i)[0] for i in range(8)]
    gif = io.BytesIO()
    Image.new("RGB", (40, 40)).save(gif, "GIF")
    bad = list(good)
    bad[1] = np.frombuffer(gif.getvalue(), np.uint8)
    bad[4] = np.zeros(0, np.uint8)
    bad[6] = good[6][:300]
    windows = np.tile(np.array([[0, 0, 150, 150]], np.int32), (8, 1))
    mirrors = np.zeros(8, np.uint8)
    pipeline = ImagePipeline(batch_size=8, image_size=64, train=True, device=CPU)
    pipeline.feed(good, windows, mirrors)
    expected = pipeline.take()
    for _ in range(2):
        pipeline.feed(bad, windows, mirrors)
        pipeline.feed(good, windows, mirrors)
        with pytest.raises(DecodeError) as error:
            pipeline.take()
        assert sorted(error.value.reasons) == [1, 4, 6]
        assert all(error.value.reasons.values())
        pipeline.replace({i: good[i] for i in (1, 4, 6)}, windows, mirrors)
        assert torch.equal(pipeline.take(), expected)
        assert torch.equal(pipeline.take(), expected)


@pytest.mark.parametrize("train", [True, False])
def test_damaged_headers_in_batches_in_flight_never_crash(train):
    # A header that does not parse once ended the process: see ImagePipeline._build.
    good = [photograph(120, 100, i)[0] for i in range(32)]
    windows = np.tile(np.array([[5, 5, 80, 80]], np.int32), (32, 1))
    extra = (windows, np.zeros(32, np.uint8)) if train else ()
    pipeline = ImagePipeline(batch_size=32, image_size=32, train=train, device=CPU)
    pipeline.feed(good, *extra)
    expected = pipeline.take()
    rng = np.random.default_rng(0)
    failures = 0
    for _ in range(25):
        damaged = list(good)
        for position in rng.choice(32, 3, replace=False):
            image = good[position].copy()
            image[rng.integers(0, 600, 3)] = rng.integers(0, 256, 3)
            damaged[position] = image[: rng.integers(20, len(image))]
        pipeline.feed(good, *extra)
        pipeline.feed(damaged, *extra)
        assert torch.equal(pipeline.take(), expected)
        pipeline.feed(good, *extra)
        try:
            pipeline.take()
        except DecodeError as error:
            failures += 1
            assert len(error.reasons) <= 3
            pipeline.feed(good, *extra)  # leaves the failed batch out
            assert torch.equal(pipeline.take(), expected)
        assert torch.equal(pipeline.take(), expected)
    assert failures > 15


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_an_option(kind, orientation):
    rng = np.random.default_rng(orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    quality = {"lossless": True} if kind == "WEBP" else {"quality": 97}
    odd = 1
    while odd:  # DALI 2.4 does not find EXIF data behind a WebP picture of odd length
        colours = rng.integers(0, 256, (5, 8, 3), dtype=np.uint8)
        blocks = Image.fromarray(np.kron(colours, np.ones((32, 32, 1), np.uint8)))
        buffer = io.BytesIO()
        blocks.save(buffer, kind, exif=exif, **quality)
        odd = kind == "WEBP" and buffer.getvalue()[34] & 1
    picture = Image.open(buffer)
    window = np.array([[10, 20, 120, 100]], np.int32)
    for rotation in (False, True):
        turned = (ImageOps.exif_transpose(picture) if rotation else picture).convert("RGB")
        expected = {
            True: turned.crop((10, 20, 130, 120)).resize((96, 96), FILTERS["cubic"]),
            False: evaluation_image(turned, 96, FILTERS["cubic"]),
        }
        for train in (True, False):
            pipeline = ImagePipeline(
                batch_size=1, image_size=96, train=train, device=CPU, exif_rotation=rotation
            )
            pipeline.feed(
                [np.frombuffer(buffer.getvalue(), np.uint8)],
                *((window, np.zeros(1, np.uint8)) if train else ()),
            )
            assert difference(levels(pipeline.take())[0], expected[train]) < 1


def odd_orientations():
    """Images that say in unusual ways that they lie on their side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    short = exif.tobytes()[6:]
    little = struct.pack("<2sHIHHHIII", b"II", 42, 8, 1, 0x0112, 4, 1, 6, 0)
    big = struct.pack(">2sHIHHHIII", b"MM", 42, 8, 1, 0x0112, 4, 1, 6, 0)
    picture = Image.open(io.BytesIO(photograph(240, 192, 4)[0].tobytes()))

    def encoded(kind, **options):
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        return buffer.getvalue()

    png = encoded("PNG")
    end = png.rindex(b"IEND") - 4
    chunk = b"eXIf" + short
    chunk = struct.pack(">I", len(short)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    webps = (encoded("WEBP", quality=q, exif=short) for q in range(90, 100))
    webp = next(webp for webp in webps if not webp[34] & 1)  # DALI 2.4 does not parse the others
    at = webp.rindex(b"EXIF") + 4
    prefixed = b"Exif\0\0" + webp[at + 4 :]
    webp = webp[8:at] + struct.pack("<I", len(prefixed)) + prefixed
    return {
        "JPEG, a long number": encoded("JPEG", exif=b"Exif\0\0" + little),
        "JPEG, a long number, big-endian": encoded("JPEG", exif=b"Exif\0\0" + big),
        "PNG, behind the pixels": png[:end] + chunk + png[end:],
        "WebP, with JPEG's prefix": b"RIFF" + struct.pack("<I", len(webp)) + webp,
    }


@pytest.mark.parametrize("name", odd_orientations())
def test_windows_are_drawn_in_the_image_as_dali_turns_it(name):
    data = odd_orientations()[name]
    encoded = np.frombuffer(data, np.uint8)
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    if _native.parse_image_header(encoded)[4] == 6:
        picture = picture.transpose(Image.Transpose.ROTATE_270)
    window = np.array([[0, 0, *picture.size]], np.int32)  # of the other way outside the image
    pipeline = ImagePipeline(
        batch_size=1, image_size=96, train=True, device=CPU, exif_rotation=True
    )
    pipeline.feed([encoded], window, np.zeros(1, np.uint8))
    expected = picture.resize((96, 96), FILTERS["cubic"])
    assert difference(levels(pipeline.take())[0], expected) < 1


def png16(pixels):
    """A PNG of 16 bits a channel, which PIL does not write."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def kinds_of_image():
    """Encoded images of unusual kinds, and the RGB picture that PIL makes of each."""
    smooth = Image.open(io.BytesIO(photograph(240, 192, 4)[0].tobytes())).convert("RGB")
    alpha = smooth.copy()
    alpha.putalpha(smooth.convert("L"))
    found = {}

    def add(name, image, kind, **options):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        found[name] = buffer.getvalue(), Image.open(buffer).convert("RGB")

    add("CMYK JPEG", smooth.convert("CMYK"), "JPEG", quality=95)
    add("grey JPEG", smooth.convert("L"), "JPEG", quality=95)
    add("progressive JPEG", smooth, "JPEG", quality=95, progressive=True)
    add("PNG with alpha", alpha, "PNG")
    add("palette PNG", smooth.quantize(64), "PNG")
    add("WebP with alpha", alpha, "WEBP", lossless=True)
    add("one pixel", smooth.crop((9, 9, 10, 10)), "PNG")
    wide = np.asarray(smooth).astype(np.uint16) * 257
    found["16-bit PNG"] = png16(wide), smooth
    found["16-bit grey PNG"] = png16(wide[:, :, :1]), Image.merge("RGB", [smooth.split()[0]] * 3)
    found["16-bit PNG with alpha"] = png16(np.dstack([wide, wide[:, :, 0]])), smooth
    return found


@pytest.mark.parametrize("name", kinds_of_image())
def test_unusual_kinds_decode_as_in_pil(name):
    encoded, picture = kinds_of_image()[name]
    width, height = picture.size
    pipeline = ImagePipeline(batch_size=1, image_size=96, train=True, device=CPU)
    window = np.array([[0, 0, width, height]], np.int32)
    pipeline.feed([np.frombuffer(encoded, np.uint8)], window, np.zeros(1, np.uint8))
    expected = picture.resize((96, 96), FILTERS["cubic"])
    assert difference(levels(pipeline.take())[0], expected) < 1


def test_half_precision_is_the_rounding_of_fp32(resize):
    encoded = [photograph(200 + i, 150, i)[0] for i in range(70)]  # more than one part
    windows = np.tile(np.array([[5, 5, 120, 120]], np.int32), (70, 1))
    images = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        pipeline = ImagePipeline(batch_size=70, image_size=32, train=True, device=CPU, dtype=dtype)
        pipeline.feed(encoded, windows, np.zeros(70, np.uint8))
        images[dtype] = pipeline.take()
        assert torch.equal(images[dtype], images[torch.float32].to(dtype))
    # What autocast makes of fp32 images in the patch embedding is what it gets of bf16 ones.
    patches = torch.nn.Linear(3 * 32 * 32, 8)
    with torch.autocast("cpu", torch.bfloat16):
        embedded = [patches(images[d].flatten(1)) for d in (torch.float32, torch.bfloat16)]
    assert torch.equal(*embedded)


def test_only_the_failed_part_is_decoded_again(resize):
    good = [photograph(120, 100, i)[0] for i in range(150)]  # three parts on a CPU
    windows = np.tile(np.array([[5, 5, 80, 80]], np.int32), (150, 1))
    mirrors = np.zeros(150, np.uint8)
    pipeline = ImagePipeline(batch_size=150, image_size=32, train=True, device=CPU)
    pipeline.feed(good, windows, mirrors)
    expected = pipeline.take()
    bad = list(good)
    for position in (3, 70, 71, 149):
        bad[position] = good[position].copy()
        at = bytes(good[position]).index(b"\xff\xc4") + 5  # counts of a Huffman table
        bad[position][at : at + 16] = 255
    pipeline.feed(bad, windows, mirrors)
    pipeline.feed(good, windows, mirrors)
    with pytest.raises(DecodeError) as error:
        pipeline.take()
    assert sorted(error.value.reasons) == [3, 70, 71, 149]
    pipeline.replace({i: good[i] for i in (3, 70, 149)} | {71: bad[71]}, windows, mirrors)
    with pytest.raises(DecodeError) as error:
        pipeline.take()
    assert sorted(error.value.reasons) == [71]
    pipeline.replace({71: good[71]}, windows, mirrors)
    assert torch.equal(pipeline.take(), expected)
    assert torch.equal(pipeline.take(), expected)


@pytest.mark.parametrize(
    "message",
    [
        "Error in mixed operator: CUDA allocation failed: 1073741824 bytes on device 0",
        "CUDA runtime API error cudaErrorIllegalAddress (700)",
        "CUDA out of memory. Tried to allocate 2.00 GiB",
    ],
)
def test_an_error_of_the_gpu_blames_no_image(message, monkeypatch):
    pipeline = ImagePipeline(batch_size=1, image_size=32, train=False, device=CPU)
    pipeline.feed([photograph(100, 90, 0)[0]])

    def fail(*_):
        raise RuntimeError(message)

    monkeypatch.setattr(pipeline, "_fetch", fail)
    with pytest.raises(RuntimeError, match=re.escape(message)) as failure:
        pipeline.take()
    assert not isinstance(failure.value, DecodeError)


@pytest.mark.parametrize("interpolation", ["cubic", "linear"])
def test_resizing_on_a_cpu_is_pillows(interpolation):
    pictures = []
    for i, size in enumerate(((300, 200), (200, 300), (90, 70), (224, 224), (700, 31), (1, 1))):
        encoded = photograph(max(size[0], 24), max(size[1], 24), i)[0]
        picture = Image.open(io.BytesIO(encoded.tobytes())).convert("RGB")
        pictures.append(picture.crop((0, 0, *size)))
    pixels = [np.array(picture) for picture in pictures]
    out = np.full((2, len(pictures), 3, 96, 96), np.nan, np.float32)
    for threads in (1, 3):
        arguments = (interpolation, False, [0.0] * 3, [1.0] * 3, threads)
        _native.resize_images(pixels, [0, 1, 0, 1, 0, 0], out[threads // 2], *arguments)
    assert (out[0] == out[1]).all()
    for i, picture in enumerate(pictures):
        expected = picture.resize((96, 96), FILTERS[interpolation])
        if i in (1, 3):
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        # Pillow works on columns or rows first, by the shape: roundings differ.
        assert difference(torch.from_numpy(out[0][i]), expected) < 0.25


def test_what_cannot_be_resized_is_refused():
    pixels, out = [np.zeros((5, 5, 3), np.uint8)], np.empty((1, 3, 8, 8), np.float32)
    for images, into, kind, message in (
        (pixels * 2, out, "cubic", "a mirror and a square for each image"),
        ([np.zeros((0, 5, 3), np.uint8)], out, "cubic", "an empty image"),
        (pixels, out[:, :, :4], "cubic", None),
        (pixels, out, "nearest", "expected cubic or linear"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            _native.resize_images(images, [0], into, kind, False, [0.0] * 3, [1.0] * 3, 1)
