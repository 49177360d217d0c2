"""Captions from every kind of file, and what is said of files that cannot be read."""

import io
import json
import tarfile

import pyarrow
import pyarrow.parquet
import pytest

from laclip import _native
from laclip.rewrite.captions import open_captions

_MEMBER = tarfile.TarInfo("caf\xe9.txt")
LATIN1 = _MEMBER.tobuf(tarfile.GNU_FORMAT, "latin1", "strict") + bytes(1024)
CAPTIONS = {"k1": "a dog", "k2": 'says "hi", twice', "k3": "two\nlines", "k4": "собака => 犬"}


def write(path, captions):
    kind = path.suffix
    if kind == ".tar":
        with tarfile.open(path, "w") as tar:
            for key, caption in captions.items():
                data = caption.encode()
                member = tarfile.TarInfo(f"{key}.txt")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    elif kind == ".jsonl":
        lines = [json.dumps({"key": k, "caption": c}) for k, c in captions.items()]
        path.write_text("\n".join(lines))
    elif kind == ".csv":
        rows = [f'{k},"{c}"'.replace('"hi"', '""hi""') for k, c in captions.items()]
        path.write_text("key,Caption\n" + "\n".join(rows))
    else:
        table = pyarrow.table({"text": list(captions.values()), "key": list(captions)})
        pyarrow.parquet.write_table(table, path)


@pytest.mark.parametrize("kind", [".tar", ".jsonl", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_captions(kind, tmp_path):
    path = tmp_path / f"captions{kind}"
    write(path, CAPTIONS)
    (shard,) = open_captions(path)
    assert dict(shard.read()) == CAPTIONS


def test_lines_of_a_text_have_their_numbers_as_keys(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\r\ntwo\u2028still two\n\nfour".encode())
    (shard,) = open_captions(tmp_path / "a.txt")
    assert list(shard.read()) == [
        ("0", "one"), ("1", "two\u2028still two"), ("2", ""), ("3", "four")
    ]  # fmt: skip


def test_half_a_character_is_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"key": "k", "caption": "a \\ud83d dog"}')
    assert list(open_captions(tmp_path / "a.jsonl")[0].read()) == [("k", "a \ufffd dog")]


def test_the_mark_that_spreadsheets_write_hides_no_key(tmp_path):
    (tmp_path / "a.csv").write_text("\ufeffkey,caption\nk,one\n")
    assert list(open_captions(tmp_path / "a.csv")[0].read()) == [("k", "one")]


def test_rows_without_a_key_have_their_numbers(tmp_path):
    (tmp_path / "a.csv").write_text("url,title\nu,one\nv,two\n")
    assert list(open_captions(tmp_path / "a.csv")[0].read()) == [("0", "one"), ("1", "two")]


def test_a_dataset_gives_its_shards_in_order(emoji_copy):
    shards = open_captions(emoji_copy)
    assert [shard.name for shard in shards] == ["00000", "00001", "00002"]
    for shard in shards:
        read = [(key, text.encode()) for key, text in shard.read()]
        assert read == _native.read_tar_texts(str(shard.path), "txt", 1 << 16)
        assert len(read) == shard.count


def test_a_folder_gives_its_files_of_one_kind(tmp_path):
    for name in "ba":
        write(tmp_path / f"{name}.jsonl", {name: "a caption"})
    assert [shard.name for shard in open_captions(tmp_path)] == ["a", "b"]
    write(tmp_path / "c.csv", CAPTIONS)
    with pytest.raises(ValueError, match="files of 2 kinds"):
        open_captions(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"key": "1", "caption": "x"}\n{"key": 2, "caption": "x"}\n', "line 2: found"),
        ("a.jsonl", b'["key"]\n', "line 1: found"),
        ("a.txt", b"fine\ncaf\xe9\n", "line 2, byte 8: not UTF-8"),
        ("a.csv", b"key,words\n1,x\n", "columns"),
        ("a.csv", b"key,text\n1\n", "line 2: 1 cells"),
        ("a.csv", b'key,text\n1,"x\n', "unexpected end"),
        ("a.tar", b"no tar at all" * 100, "a.tar"),
        ("a.tar", LATIN1, "the name of the member at byte 512 is not UTF-8"),
    ],
)
def test_an_unreadable_file_is_named_with_its_line(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as raised:
        list(open_captions(tmp_path / name)[0].read())
    assert name in str(raised.value)


def test_what_is_no_file_of_captions_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_captions(tmp_path / "nothing")
    (tmp_path / "a.docx").write_bytes(b"")
    with pytest.raises(ValueError, match="expected a dataset's folder"):
        open_captions(tmp_path / "a.docx")
    (tmp_path / "a.parquet").write_bytes(b"PAR0")
    with pytest.raises(ValueError, match="not Parquet"):
        list(open_captions(tmp_path / "a.parquet")[0].read())
