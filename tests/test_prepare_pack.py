"""laclip pack: lists of paths and captions into shards, as the LaCLIP release has them."""

import csv
import io
import json
import tarfile

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from laclip import _native
from laclip.cli import main
from laclip.dataset import open_dataset
from laclip.prepare.index import index
from laclip.prepare.pack import pack
from laclip.tokenizer import load_tokenizer

ROWS = [
    ("sub/0.jpg", "a square, red"),
    ("gone.jpg", "a dead link"),
    ("2.png", 'quoted "words", commas\nand a newline'),
    ("3.gif", "a moving picture"),
    ("../outside.jpg", "not yours"),
    ("5.jpg", "  "),
    ("6.webp", "a webp picture"),
    ("broken.jpg", "a broken picture"),
    ("sub", "a folder"),
    ("9.jpg", "the last one"),
    ("", "no path"),
    ("zero.jpg", "nothing inside"),
]
GOOD = [0, 2, 6, 9]


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for row, (path, _) in enumerate(ROWS):
        if path in ("gone.jpg", "sub", ""):
            continue
        data = io.BytesIO()
        kind = {"jpg": "JPEG", "png": "PNG", "gif": "GIF", "webp": "WEBP"}[path.split(".")[-1]]
        Image.new("RGB", (10 + row, 9)).save(data, kind)
        (folder / path).write_bytes(data.getvalue())
    (folder / "broken.jpg").write_bytes((folder / "9.jpg").read_bytes()[:15])
    (folder / "zero.jpg").write_bytes(b"")
    return folder


def write_list(path, header=True):
    if path.suffix == ".parquet":
        columns = {"url": [p for p, _ in ROWS], "caption": [c for _, c in ROWS]}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        return path
    coding = "utf-8-sig" if path.name == "bom.csv" else "utf-8"
    with open(path, "w", newline="", encoding=coding) as file:
        tabs = path.name in ("l.tsv", "tabs.csv")
        writer = csv.writer(file, delimiter="\t" if tabs else ",")
        if header:
            writer.writerow(("Title", "filepath"))
        for image, caption in ROWS:
            writer.writerow((caption, image) if header else (image, caption))
    return path


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("l.csv", True),
        ("l.csv", False),
        ("bom.csv", True),
        ("l.parquet", True),
        ("l.tsv", False),
        ("tabs.csv", True),
        ("tabs.csv", False),
    ],  # open_clip's lists have tabs
)
def test_good_rows_are_packed_and_the_others_counted(name, header, images, tmp_path):
    report = pack(tmp_path / "the out", write_list(tmp_path / name, header), images, rows=5)
    assert "4 of 12 rows packed" in report
    assert report.endswith(f"Next: laclip index '{tmp_path}/the out'")
    for line in (
        "3 x no such file (first: row 1: gone.jpg)",
        "1 x image kind is not JPEG, PNG or WebP (first: row 3: 3.gif)",
        "1 x path leaves the image folder (first: row 4: ../outside.jpg)",
        "1 x no caption (first: row 5: 5.jpg)",
        "1 x broken image header (first: row 7: broken.jpg)",
        "1 x image of zero bytes (first: row 11: zero.jpg)",
    ):
        assert line in report
    index(tmp_path / "the out")
    dataset = open_dataset(tmp_path / "the out")
    found = {}
    for shard in range(len(dataset.shards)):
        texts = dict(_native.read_tar_texts(str(dataset.tar_path(shard)), "txt", 1 << 16))
        data = dataset.tar_path(shard).read_bytes()
        table = dataset.samples(shard)
        for i, record in enumerate(table.records):
            begin = int(record["offset"])
            row = int(record["row"])
            assert table.key(i) == f"{row:09}"
            image = data[begin : begin + int(record["bytes"])]
            assert image == (images / ROWS[row][0]).read_bytes()
            found[row] = texts[table.key(i)].decode()
    assert found == {row: ROWS[row][1] for row in GOOD}
    assert [shard.name for shard in dataset.shards] == ["00000.tar", "00001.tar"]


@pytest.mark.parametrize(
    ("join", "suffix"), [("row", "csv"), ("path", "csv"), ("caption", "csv"), ("row", "parquet")]
)
def test_a_release_goes_from_files_to_a_training_ready_folder(join, suffix, images, tmp_path):
    original = write_list(tmp_path / f"cc3m_original.{suffix}")
    sources = ("chatgpt", "bard", "mscoco", "human")
    arguments = []
    for source in sources:
        path = tmp_path / f"cc3m_{source}.txt"
        path.write_text("".join(f"{source} rewrite number {row}\n" for row in range(len(ROWS))))
        arguments += ["--rewrites", f"{source}={path}"]
    out = tmp_path / "out"
    command = ["pack", out, "--pairs", original, "--images", images, "--rows", 5, "--jobs", 1]
    assert main([str(word) for word in command]) == 0
    assert main(["index", str(out), "--decode", "--jobs", "1"]) == 0
    command = ["tokenize", out, "--original-csv", original, "--join", join, "--jobs", 1]
    assert main([*map(str, command), *arguments]) == 0
    assert main(["verify", str(out), "--jobs", "1"]) == 0
    dataset = open_dataset(out)
    assert dataset.variants == ("original", *sources) and dataset.num_samples == len(GOOD)
    tokenizer = load_tokenizer()
    for shard in range(len(dataset.shards)):
        captions = dataset.captions(shard)
        for i, row in enumerate(dataset.samples(shard).records["row"].tolist()):
            for variant, source in enumerate(sources, 1):
                text = f"{source} rewrite number {row}"
                assert captions.tokens(i, variant).tolist() == tokenizer.encode(text)


def test_links_in_the_image_folder_are_followed(images, tmp_path):
    """As caches of downloads have them: a folder of links to files that lie elsewhere."""
    links = tmp_path / "links"
    (links / "sub").mkdir(parents=True)
    for path, _ in ROWS:
        if (images / path).is_file() and not path.startswith(".."):
            (links / path).symlink_to(images / path)
    pairs = write_list(tmp_path / "l.csv")
    report = pack(tmp_path / "a", pairs, images)
    assert pack(tmp_path / "b", pairs, links) == report.replace(f"{tmp_path}/a", f"{tmp_path}/b")
    whole = [(images / path, caption) for path, caption in ROWS]  # absolute, by another name
    (tmp_path / "again").symlink_to(images)
    with open(tmp_path / "absolute.csv", "w", newline="") as file:
        csv.writer(file).writerows(whole)
    assert "4 of 12 rows" in pack(tmp_path / "c", tmp_path / "absolute.csv", tmp_path / "again")


def test_packing_again_keeps_what_is_whole_and_mends_what_is_not(images, tmp_path):
    out = tmp_path / "out"
    pairs = write_list(tmp_path / "l.csv")
    report = pack(out, pairs, images, rows=4)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    times = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    again = pack(out, pairs, images, rows=4).splitlines()
    assert "  3 of 3 shards are an earlier run's: what they skip was not looked for" in again[-2]
    assert [*again[:-2], again[-1]] == report.splitlines()
    assert times == {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    (out / "00000.tar").write_bytes(before["00000.tar"][:600])
    (out / "00001.packed").unlink()
    (out / "00002.packed").write_bytes(b"{")
    assert pack(out, pairs, images, rows=4) == report
    assert before == {p.name: p.read_bytes() for p in out.iterdir()}


def test_processes_give_what_one_gives(images, tmp_path):
    pairs = write_list(tmp_path / "l.csv")
    pack(tmp_path / "a", pairs, images, rows=3)
    pack(tmp_path / "b", pairs, images, rows=3, jobs=2)
    for path in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes()


def test_another_list_or_a_folder_of_others_is_refused(images, tmp_path, capsys):
    pairs = write_list(tmp_path / "l.csv")
    pack(tmp_path / "out", pairs, images)
    with pytest.raises(ValueError, match="another list or shard size"):
        pack(tmp_path / "out", pairs, images, rows=3)
    other = tmp_path / "other"
    other.mkdir()
    with tarfile.open(other / "0.tar", "w"):
        pass
    with pytest.raises(ValueError, match="holds tars that laclip pack did not write"):
        pack(other, pairs, images)
    for bad, message in (
        (("--pairs", tmp_path / "no.csv", "--images", images), "no such CSV"),
        (("--pairs", pairs, "--images", tmp_path / "no"), "no such folder"),
        (("--pairs", pairs, "--images", images, "--rows", "0"), "expected 1 or more"),
    ):
        assert main(["pack", str(tmp_path / "x"), *map(str, bad)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no rows in it"),
        (b"only-a-path.jpg\n", "line 1: 1 cells"),
        ("a.jpg,caf\xe9\n".encode("latin1"), "line 1, byte 9: not UTF-8"),
        (b'a.jpg,"never closed\n', "line 1: unexpected end of data. A text that begins with"),
        (b"9.jpg,a dog, on a lawn\n9.jpg,a cat\n", "line 2: 2 cells, its first row has 3"),
    ],
)
def test_a_broken_list_is_refused(content, message, images, tmp_path):
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        pack(tmp_path / "out", path, images)
    assert "bad.csv" in str(error.value)


def test_captions_of_bytes_are_text_if_they_are_utf8(images, tmp_path):
    path = tmp_path / "l.parquet"
    for caption in (b"caf\xe9", "café".encode()):
        columns = {"path": ["no.jpg", "9.jpg"], "caption": [b"", caption]}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        if caption == b"caf\xe9":
            with pytest.raises(ValueError, match=r"l\.parquet: row 1: its 'caption' is not UTF-8"):
                pack(tmp_path / "out", path, images)
    pack(tmp_path / "out", path, images)
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        assert tar.extractfile("000000001.txt").read() == caption


def test_a_list_without_a_single_image_is_refused_and_leaves_nothing(images, tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("shoe,price\nred,12\nblue,13\n")  # neither a header that it knows nor paths
    with pytest.raises(ValueError, match="none of its 3 rows could be packed") as error:
        pack(tmp_path / "out", path, images)
    assert "3 x no such file (first: row 0: shoe)" in str(error.value)
    assert list((tmp_path / "out").iterdir()) == []
    pack(tmp_path / "out", write_list(tmp_path / "l.csv"), images)  # the folder serves another


def test_the_record_of_a_pack_tells_what_was_skipped(images, tmp_path):
    pack(tmp_path / "out", write_list(tmp_path / "l.csv"), images)
    record = json.loads((tmp_path / "out" / "pack.json").read_text())
    assert record["packed"] == 4 and sum(n for n, _ in record["skipped"].values()) == 8
