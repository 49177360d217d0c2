"""laclip index: tars in, .samples files and dataset.json out; broken tars are refused."""

import io
import os
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from laclip import _native
from laclip.cli import main
from laclip.dataset import (
    ALPHA,
    BAD,
    CMYK,
    DECODED,
    GRAYSCALE,
    PROGRESSIVE,
    REASONS,
    SIXTEEN_BIT,
    open_dataset,
)
from laclip.prepare.index import index, index_shard


def encode(mode="RGB", size=(31, 17), kind="JPEG", **options):
    rng = np.random.default_rng(0)
    dtype = np.uint16 if mode == "I;16" else np.uint8
    as_mode = {} if mode == "I;16" else {"mode": mode}
    shape = (size[1], size[0]) + ((len(mode),) if mode not in ("L", "I;16") else ())
    image = Image.fromarray(rng.integers(0, 255, shape).astype(dtype), **as_mode)
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


JPEG = encode()


def tar_bytes(members, tar_format=tarfile.USTAR_FORMAT):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tar_format) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def pairs(*keys):
    return [m for key in keys for m in ((f"{key}.jpg", JPEG), (f"{key}.txt", b"a red dog"))]


def indexed(folder, members, name="00000.tar", **options):
    (folder / name).write_bytes(tar_bytes(members, **options))
    index(folder)
    dataset = open_dataset(folder)
    return dataset.samples([shard.name for shard in dataset.shards].index(name))


def reasons(table):
    return {table.key(i): REASONS[r["reason"]] for i, r in enumerate(table.records) if r["reason"]}


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_members_are_found_where_tarfile_finds_them(tmp_path, tar_format):
    long = "folder/" * 12 + "k" * 60
    keys = ["000000001", "a-b_c", "folder/x", long, "日本語"]
    if tar_format == tarfile.GNU_FORMAT:
        keys.append("y" * 300)
    if tar_format == tarfile.PAX_FORMAT:
        keys.append("z" * 3000)
    table = indexed(tmp_path, pairs(*keys), tar_format=tar_format)
    with tarfile.open(tmp_path / "00000.tar") as tar:
        expected = {m.name: (m.offset_data, m.size) for m in tar if m.name.endswith(".jpg")}
    assert table.keys() == keys
    for key, record in zip(keys, table.records, strict=True):
        assert (record["offset"], record["bytes"]) == expected[f"{key}.jpg"]


def test_gnu_tar_writes_what_index_reads(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for key in ("one", "two", "k" * 120):
        (source / f"{key}.jpg").write_bytes(JPEG)
        (source / f"{key}.txt").write_text("a dog")
    (source / "link.jpg").symlink_to("one.jpg")
    command = ["tar", "--sort=name", "-cf", str(tmp_path / "00000.tar"), "-C", str(source), "."]
    subprocess.run(command, check=True)
    index(tmp_path)
    assert sorted(open_dataset(tmp_path).samples(0).keys()) == sorted(["one", "two", "k" * 120])


HEADERS = [
    (encode(), "jpeg", 0),
    (encode(progressive=True), "jpeg", PROGRESSIVE),
    (encode("L"), "jpeg", GRAYSCALE),
    (encode("CMYK"), "jpeg", CMYK),
    (encode(kind="PNG"), "png", 0),
    (encode("RGBA", kind="PNG"), "png", ALPHA),
    (encode("L", kind="PNG"), "png", GRAYSCALE),
    (encode("I;16", kind="PNG"), "png", GRAYSCALE | SIXTEEN_BIT),
    (encode("L", kind="PNG", transparency=3), "png", GRAYSCALE | ALPHA),
    (encode(kind="WEBP"), "webp", 0),
    (encode(kind="WEBP", lossless=True), "webp", 0),
    (encode("RGBA", kind="WEBP"), "webp", ALPHA),
    (encode("RGBA", kind="WEBP", lossless=True), "webp", ALPHA),
]


@pytest.mark.parametrize(("data", "kind", "flags"), HEADERS)
def test_headers_are_read_as_pillow_reads_them(data, kind, flags):
    found = _native.parse_image_header(np.frombuffer(data, np.uint8))
    formats = ["unknown", "jpeg", "png", "webp"]
    assert (formats[found[0]], found[1:3], found[3], found[5]) == (kind, (31, 17), flags, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_read(orientation, kind):
    exif = Image.Exif()
    exif[0x010F] = "a camera's maker"
    exif[0x0112] = orientation
    data = encode(kind=kind, exif=exif)
    assert _native.parse_image_header(np.frombuffer(data, np.uint8))[4] == orientation


@pytest.mark.parametrize(("data", "kind", "flags"), HEADERS)
@settings(max_examples=25)
@given(cut=st.integers(0, 400), at=st.integers(0, 60), value=st.integers(0, 255))
def test_cut_and_damaged_headers_are_never_fatal(data, kind, flags, cut, at, value):
    damaged = bytearray(data[:cut])
    if at < len(damaged):
        damaged[at] = value
    found = _native.parse_image_header(np.frombuffer(bytes(damaged), np.uint8))
    assert found[5] or (found[1] > 0 and found[2] > 0)


def test_bad_samples_are_flagged_with_their_reason(tmp_path, capsys):
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(
        ">I4sIIBBBBB", 13, b"IHDR", 1 << 30, 1 << 30, 8, 2, 0, 0, 0
    )
    bomb += bytes(4)
    text = b"a red dog"
    members = [
        *pairs("good"),
        ("captionless.jpg", JPEG),
        ("imageless.txt", text),
        ("moving.gif", b"GIF89a"),
        ("moving.txt", text),
        ("drawn.svg", b"<svg/>"),
        ("drawn.txt", text),
        ("lying.jpg", b"GIF89a"),
        ("lying.txt", text),
        ("avif.jpg", b"\0\0\0\x1cftypavif" + bytes(20)),
        ("avif.txt", text),
        ("empty.png", b""),
        ("empty.txt", text),
        ("broken.jpg", JPEG[:30]),
        ("broken.txt", text),
        ("bomb.png", bomb),
        ("bomb.txt", text),
        *pairs("good"),
    ]
    table = indexed(tmp_path, members)
    found = [(table.key(i), REASONS[r["reason"]]) for i, r in enumerate(table.records)]
    assert found == [
        ("good", "not bad"),
        ("captionless", "no caption"),
        ("imageless", "no image"),
        ("moving", "image kind is not JPEG, PNG or WebP"),
        ("drawn", "image kind is not JPEG, PNG or WebP"),
        ("lying", "image kind is not JPEG, PNG or WebP"),
        ("avif", "image kind is not JPEG, PNG or WebP"),
        ("empty", "image of zero bytes"),
        ("broken", "broken image header"),
        ("bomb", "image too large"),
        ("good", "key occurs earlier in the shard"),
    ]
    bad = table.records["flags"] & BAD != 0
    assert bad.tolist() == (table.records["reason"] > 0).tolist()
    assert open_dataset(tmp_path).shards[0].bad == 10
    assert main(["inspect", str(tmp_path), "--bad"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[2::2] for line in lines] == [list(pair) for pair in found[1:]]
    assert lines[0].startswith("00000.tar\tsample 1\tcaptionless\tbyte ")


def test_two_captions_of_one_key_are_two_samples(tmp_path):
    table = indexed(tmp_path, [*pairs("a"), ("a.txt", b"another"), *pairs("b")])
    assert table.keys() == ["a", "a", "b"]
    assert reasons(table) == {"a": "key occurs earlier in the shard"}


def test_the_row_that_pack_recorded_is_read(tmp_path):
    json = b'{"caption": "say \\"laclip_row\\": 9", "laclip_row": 4123}'
    table = indexed(tmp_path, [("a.jpg", JPEG), ("a.json", json), ("a.txt", b"x y"), *pairs("b")])
    assert table.records["row"].tolist() == [4123, 0xFFFFFFFF]


def test_keys_in_two_shards_are_counted(tmp_path, capsys):
    (tmp_path / "0.tar").write_bytes(tar_bytes(pairs("a", "b")))
    (tmp_path / "1.tar").write_bytes(tar_bytes(pairs("b", "c")))
    assert main(["index", str(tmp_path), "--jobs", "1"]) == 0
    assert "1 keys occur more than once (first: 0.tar: b and 1.tar: b)" in capsys.readouterr().out


def test_decode_flags_what_has_a_whole_header_and_broken_pixels(tmp_path):
    cut = encode(size=(99, 99))
    members = [*pairs("a"), ("cut.jpg", cut[: len(cut) // 2]), ("cut.txt", b"x y"), *pairs("b")]
    (tmp_path / "00000.tar").write_bytes(tar_bytes(members))
    index(tmp_path)
    before = open_dataset(tmp_path)
    assert before.shards[0].bad == 0
    index(tmp_path, decode=True)
    after = open_dataset(tmp_path)
    assert reasons(after.samples(0)) == {"cut": "does not decode"}
    assert (after.samples(0).records["flags"] & DECODED).all()
    assert after.fingerprint != before.fingerprint
    index(tmp_path)  # what was learnt is kept
    assert open_dataset(tmp_path).fingerprint == after.fingerprint
    for tar in tmp_path.glob("*.tar"):  # also where copies are newer than what was learnt
        os.utime(tar, (2e9, 2e9))
    index(tmp_path)
    assert open_dataset(tmp_path).fingerprint == after.fingerprint


GOOD = tar_bytes(pairs("a", "b"))


def with_header(**fields):
    """A tar whose first header has other fields, and the right checksum."""
    block = bytearray(GOOD[:512])
    places = {"size": (124, 12), "type": (156, 1), "name": (0, 100)}
    for name, value in fields.items():
        at, length = places[name]
        block[at : at + length] = value.ljust(length, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + GOOD[512:]


BROKEN = {
    "empty file": (b"", "the file is empty"),
    "not a tar": (b"this is a text" * 100, "not a tar"),
    "shorter than a block": (b"abc", "not a tar"),
    "cut in a member": (GOOD[:700], "cut short inside member 'a.jpg' at byte 512"),
    "cut in a header": (GOOD[: 512 + 1024 + 100], "cut short inside the header at byte 1536"),
    "cut between members": (GOOD[: 512 + 1024], "no end mark at byte 1536"),
    "no samples": (bytes(10240), "holds no samples"),
    "damaged header": (GOOD[:3] + b"?" + GOOD[4:], "no valid header at byte 0"),
    "second archive": (GOOD + GOOD, "a second archive begins at byte 10240"),
    "huge size": (with_header(size=b"77777777777"), "8589934591 bytes announced, 9728 left"),
    "base-256 size": (with_header(size=b"\x80" + b"\xff" * 11), "has no valid size"),
    "negative size": (with_header(size=b"\xff" * 12), "has no valid size"),
    "huge pax header": (with_header(type=b"x", size=b"00000001000"), "pax"),
    "sparse": (with_header(type=b"S"), "sparse"),
    "name of no text": (with_header(name=b"\xff\xfe.jpg"), "not UTF-8"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_tar_is_refused_with_name_and_position(case, tmp_path, capsys):
    data, message = BROKEN[case]
    (tmp_path / "bad.tar").write_bytes(data)
    assert main(["index", str(tmp_path), "--jobs", "1"]) == 2
    error = capsys.readouterr().err
    assert "bad.tar: " in error and message in error and "Traceback" not in error
    assert not (tmp_path / "dataset.json").exists()


def test_all_broken_tars_are_named_at_once_and_the_others_stay_indexed(tmp_path):
    for name, data in (("0", GOOD[:700]), ("1", GOOD), ("2", b"")):
        (tmp_path / f"{name}.tar").write_bytes(data)
    (tmp_path / "3.tar").symlink_to("gone")
    (tmp_path / "4.tar").write_bytes(GOOD)
    broken = r"(?s)0\.tar: cut short.*2\.tar: the file is empty.*No such file.*3\.tar"
    with pytest.raises(ValueError, match=broken):
        index(tmp_path)
    assert (tmp_path / "1.samples").exists() and (tmp_path / "4.samples").exists()


def test_a_tar_whose_name_is_not_utf8_is_refused(tmp_path, capsys):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.tar")).write_bytes(GOOD)
    assert main(["index", str(tmp_path), "--jobs", "1"]) == 2
    assert r"caf\xe9.tar': a name that is not UTF-8" in capsys.readouterr().err


def test_links_devices_and_dots_are_only_names(tmp_path):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for kind, name in ((tarfile.SYMTYPE, "a.jpg"), (tarfile.LNKTYPE, "b.jpg"), (b"3", "c.jpg")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, name, 1 << 30
            tar.addfile(member)
        for name, data in pairs("../../../tmp/escape", "/etc/absolute"):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    (tmp_path / "00000.tar").write_bytes(out.getvalue())
    index(tmp_path)
    assert open_dataset(tmp_path).samples(0).keys() == ["../../../tmp/escape", "/etc/absolute"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "00000.samples", "00000.tar", "dataset.json",
    ]  # fmt: skip


@settings(max_examples=200)
@given(st.data())
def test_damaged_tars_are_read_or_refused(tmp_path_factory, data):
    """Never a crash, and never a record that points outside the file."""
    damaged = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    path = tmp_path_factory.mktemp("damaged") / "a.tar"
    path.write_bytes(damaged)
    try:
        scan = _native.scan_tar(str(path))
    except ValueError:
        return
    for offset, size in np.frombuffer(scan["records"], "<u8,<u4,V20")[["f0", "f1"]].tolist():
        assert offset + size <= len(damaged)


def test_the_recorded_checksum_is_that_of_the_tar(tmp_path):
    big = os.urandom((3 << 20) + 77)  # larger than one read
    data = tar_bytes([("a.jpg", JPEG + big), ("a.txt", b"a dog"), ("b.bin", big), *pairs("c")])
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    scan = _native.scan_tar(str(path))
    assert scan["shard_checksum"] == _native.xxh64(np.frombuffer(data, np.uint8))
    assert (scan["count"], scan["other_members"], scan["shard_bytes"]) == (2, 1, len(data))


def test_indexing_again_changes_no_byte(tmp_path):
    indexed(tmp_path, pairs("a", "b"))
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.glob("*.samples")}
    index(tmp_path)
    assert before == {
        p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.glob("*.samples")
    }
    index(tmp_path, force=True)
    assert all((tmp_path / n).read_bytes() == data for n, (data, _) in before.items())


def test_a_changed_tar_is_indexed_again(tmp_path):
    first = indexed(tmp_path, pairs("a", "b")).header["checksum"]
    table = indexed(tmp_path, pairs("a", "c"))
    assert table.keys() == ["a", "c"] and table.header["checksum"] != first


def test_a_tar_that_is_replaced_by_an_older_one_of_its_size_is_indexed_again(tmp_path):
    indexed(tmp_path, pairs("a", "b"))
    other = tmp_path / "other"
    other.write_bytes(tar_bytes(pairs("a", "c")))
    os.utime(other, (1e9, 1e9))
    other.replace(tmp_path / "00000.tar")
    index(tmp_path)
    assert open_dataset(tmp_path).samples(0).keys() == ["a", "c"]


def test_of_what_dataset_json_records_only_headers_are_read(tmp_path):
    indexed(tmp_path, [*pairs("a", "b"), ("bad.jpg", JPEG)])
    manifest, path = tmp_path / "dataset.json", tmp_path / "00000.samples"
    recorded, whole = manifest.read_bytes(), path.read_bytes()
    path.write_bytes(whole[:-1] + b"?")
    assert "1 bad\n  1 x found by an earlier run\n" in index(tmp_path)
    assert (manifest.read_bytes(), path.read_bytes()[-1:]) == (recorded, b"?")
    index(tmp_path, decode=True)
    assert path.read_bytes()[-3:] == b"bad"
    for damaged in (whole[:-1], whole[:60] + b"????" + whole[64:], b""):
        path.write_bytes(damaged)  # as a loader would refuse it
        index(tmp_path)
        assert (manifest.read_bytes(), path.read_bytes()) == (recorded, whole)
    manifest.unlink()  # an interrupted run writes none
    path.write_bytes(whole[:-1] + b"?")
    index(tmp_path)
    assert path.read_bytes() == whole
    manifest.write_bytes(recorded.replace(b'"bad": 1', b'"bad": 0'))
    index(tmp_path)
    assert manifest.read_bytes() == recorded


def test_tars_that_come_while_it_runs_are_told(tmp_path, monkeypatch):
    (tmp_path / "0.tar").write_bytes(GOOD)

    def scan_while_another_comes(tar, *arguments):
        (tmp_path / "1.tar").write_bytes(GOOD)
        return index_shard(tar, *arguments)

    monkeypatch.setattr("laclip.prepare.index.index_shard", scan_while_another_comes)
    told = f"1 more tars came meanwhile. Run: laclip index {tmp_path}"
    assert index(tmp_path).endswith(told)
    assert told not in index(tmp_path)


def test_two_processes_give_what_one_gives(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        for i in range(4):
            (folder / f"{i}.tar").write_bytes(tar_bytes(pairs(f"a{i}", f"b{i}")))
    index(one)
    command = [sys.executable, "-m", "laclip.cli", "index", str(two), "--jobs", "2"]
    subprocess.run(command, check=True)
    for path in one.iterdir():
        assert (two / path.name).read_bytes() == path.read_bytes()
