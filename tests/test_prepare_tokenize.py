"""laclip tokenize: every way in which rewrites find their samples, and what is refused."""

import csv
import io
import json
import re
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from laclip.cli import main
from laclip.dataset import CAPTION_MISSING, CAPTION_SHORT, open_dataset
from laclip.prepare.index import index
from laclip.prepare.store import TextStore, build_store
from laclip.prepare.tokenize import JOURNAL, MAX_TOKENS, tokenize
from laclip.prepare.verify import verify
from laclip.tokenizer import load_tokenizer

IMAGE = io.BytesIO()
Image.new("RGB", (8, 8)).save(IMAGE, "JPEG")
TOKENIZER = load_tokenizer()

# key: (caption, row, image path)
SAMPLES = {
    "k0": ("a red dog", 0, "img/0.jpg"),
    "k2": ("a cat, grey\nand small", 2, "img/2.jpg"),
    "k3": ('the "big" house', 3, "img/3.jpg"),
    "k5": ("a red dog", 5, "img/5.jpg"),
}
REWRITES = {"k0": "one dog in red", "k2": "grey kitten sits", "k3": "large home", "k5": "dog, red"}


def make(folder, shards=2):
    folder.mkdir(exist_ok=True)
    items = list(SAMPLES.items())
    for shard in range(shards):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for key, (caption, row, path) in items[shard::shards]:
                extra = {"laclip_row": row, "laclip_path": path, "blip": f"blip {key} text"}
                for extension, data in (
                    ("jpg", IMAGE.getvalue()),
                    ("txt", caption.encode()),
                    ("json", json.dumps(extra).encode()),
                ):
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    index(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "set")


def texts(folder, variant):
    """key -> decoded text of a variant, None where it is missing."""
    dataset = open_dataset(folder)
    number = dataset.variants.index(variant)
    found = {}
    for shard in range(len(dataset.shards)):
        samples, captions = dataset.samples(shard), dataset.captions(shard)
        for i, key in enumerate(samples.keys()):
            missing = captions.flags(i, number) & CAPTION_MISSING
            tokens = captions.tokens(i, number).tolist()
            assert not (missing and tokens)
            found[key] = None if missing else tokens
    return found


def encoded(expected):
    return {key: None if text is None else TOKENIZER.encode(text) for key, text in expected.items()}


def write_keyed(path):
    rows = [*REWRITES.items(), ("nobody", "a text for no sample"), ("null", None)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"key": k, "text": t}) + "\n" for k, t in rows))
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([("text", "url", "key"), *((t, "-", k) for k, t in rows)])
    else:
        table = pyarrow.table({"key": [k for k, _ in rows], "text": [t for _, t in rows]})
        pyarrow.parquet.write_table(table, path)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_rewrites_join_by_key(suffix, folder, tmp_path):
    report = tokenize(folder, {"llm": write_keyed(tmp_path / f"r.{suffix}")})
    assert texts(folder, "llm") == encoded(REWRITES)
    assert texts(folder, "original") == encoded({k: c for k, (c, _, _) in SAMPLES.items()})
    (line,) = [line for line in report.splitlines() if line.split()[0] == "llm"]
    assert line.split()[5] == ("2" if suffix == "csv" else "1")  # a CSV has no null
    assert "llm: no sample for the rewrite of 'nobody'" in report


def test_a_second_text_of_a_key_is_counted_apart(folder, tmp_path):
    path = tmp_path / "r.jsonl"
    twice = [("k0", "the first"), ("x", "of nobody"), ("k0", "the second"), ("x", "nor this")]
    path.write_text("".join(json.dumps({"key": k, "text": t}) + "\n" for k, t in twice))
    report = tokenize(folder, {"llm": path}).splitlines()
    assert texts(folder, "llm")["k0"] == TOKENIZER.encode("the first")
    assert report[3].split()[5] == "1"
    assert report[5:] == [
        "  llm: no sample for the rewrite of 'x'",
        "  llm: 2 texts not used, as their key has an earlier one (first: 'k0')",
        f"Next: laclip verify {folder}",
    ]


def test_samples_of_one_key_in_two_shards_are_told_to_share_a_text(folder, tmp_path):
    (folder / "2.tar").write_bytes((folder / "1.tar").read_bytes())
    index(folder)
    report = tokenize(folder, {"llm": write_keyed(tmp_path / "r.jsonl")})
    assert "  llm: 2 samples have the text of another, as they have its key" in report.splitlines()


def test_rewrites_come_from_a_json_field(folder):
    tokenize(folder, {"blip": "json:blip"})
    assert texts(folder, "blip") == encoded({key: f"blip {key} text" for key in SAMPLES})


def release(tmp_path, header=True, rows=7):
    """A release's CSV with quoted commas and newlines, rows 1, 4 and 6 of dead links."""
    by_row = {row: (path, caption) for caption, row, path in SAMPLES.values()}
    original = tmp_path / "x_original.csv"
    with open(original, "w", newline="") as file:
        writer = csv.writer(file)
        if header:
            writer.writerow(("image_path", "caption"))
        for row in range(7):
            writer.writerow(by_row.get(row, (f"img/{row}.jpg", f'dead, "row"\n{row}')))
    text = tmp_path / "x_llama.txt"
    text.write_text("".join(f"rewrite of row {row}\n" for row in range(rows)))
    return original, text


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("join", ["row", "path", "caption"])
def test_release_texts_join_by_row_path_or_caption(join, header, folder, tmp_path):
    original, text = release(tmp_path, header)
    report = tokenize(folder, {"llama": text}, original_csv=original, join=join)
    shown = {"row": "row 1", "path": "'img/1.jpg'", "caption": "'dead, \"row\" 1'"}[join]
    assert f"llama: no sample for the rewrite of {shown}" in report
    expected = {key: f"rewrite of row {row}" for key, (_, row, _) in SAMPLES.items()}
    if join == "caption":  # two rows have this caption: the first one's rewrite serves both
        expected["k5"] = expected["k0"]
    assert texts(folder, "llama") == encoded(expected)


@pytest.mark.parametrize("join", ["row", "path"])
def test_a_list_whose_captions_are_not_those_of_the_tars_is_refused(join, folder, tmp_path):
    original, text = release(tmp_path, header=False)
    *first, last = list(csv.reader(original.open(newline="")))
    shifted = [(row[0], caption) for row, (_, caption) in zip([*first, last], [last, *first])]
    with open(original, "w", newline="") as file:
        csv.writer(file).writerows(shifted)
    with pytest.raises(ValueError, match=r"not the list of .*: 2 of the 2 captions compared") as e:
        tokenize(folder, {"llama": text}, original_csv=original, join=join)
    assert "row 0 is 'dead, \"row\" 6', its sample 'a red dog'" in str(e.value)
    assert open_dataset(folder).variants == ()


def test_captions_are_compared_but_for_white_space(folder, tmp_path):
    original, text = release(tmp_path)
    original.write_text(original.read_text().replace("a red dog", " a red  dog"))
    tokenize(folder, {"llama": text}, original_csv=original, join="caption")
    assert texts(folder, "llama")["k0"] == TOKENIZER.encode("rewrite of row 0")


def test_tars_without_rows_and_paths_are_told_to_join_by_caption(folder, tmp_path):
    original, text = release(tmp_path)
    for tar in folder.glob("*.tar"):
        tar.write_bytes(tar.read_bytes().replace(b'"laclip_', b'"nothing'))
    assert index(folder).endswith(f"Next: laclip tokenize {folder}")
    for join in ("row", "path"):
        with pytest.raises(ValueError, match=f"by its {join}.*is None.* Say --join caption"):
            tokenize(folder, {"llama": text}, original_csv=original, join=join)


@pytest.mark.parametrize("rows", [6, 8])
def test_a_text_file_of_another_length_is_refused(rows, folder, tmp_path):
    original, text = release(tmp_path, rows=rows)
    with pytest.raises(ValueError, match=rf"x_llama\.txt: {rows} lines, but .* has 7 rows") as e:
        tokenize(folder, {"llama": text}, original_csv=original)
    assert ("('img/0.jpg', 'a red dog'), is a header" in str(e.value)) == (rows == 6)
    assert open_dataset(folder).variants == ()


def test_one_variant_is_added_replaced_or_dropped_alone(folder, tmp_path):
    path = write_keyed(tmp_path / "r.jsonl")
    tokenize(folder, {"a": path, "b": "json:blip"})
    tars = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.tar")}
    originals, blip = texts(folder, "original"), texts(folder, "b")
    path.write_text('{"key": "k3", "text": "a new one"}\n')
    tokenize(folder, {"a": path})
    assert open_dataset(folder).variants == ("original", "a", "b")
    new = encoded({"k0": None, "k2": None, "k3": "a new one", "k5": None})
    assert (texts(folder, "original"), texts(folder, "a"), texts(folder, "b")) == (
        originals, new, blip,
    )  # fmt: skip
    tokenize(folder, {"c": path}, drop=("b",))
    assert open_dataset(folder).variants == ("original", "a", "c")
    assert texts(folder, "a") == texts(folder, "c") == new
    assert tars == {p.name: p.stat().st_mtime_ns for p in folder.glob("*.tar")}


def test_adding_variants_in_turn_equals_adding_them_at_once(tmp_path):
    path = write_keyed(tmp_path / "r.jsonl")
    one, two = make(tmp_path / "one"), make(tmp_path / "two")
    tokenize(one, {"a": path, "b": "json:blip"})
    tokenize(two, {"a": path})
    tokenize(two, {"b": "json:blip"})
    for file in one.iterdir():
        assert (two / file.name).read_bytes() == file.read_bytes()


def test_processes_give_what_one_gives(tmp_path):
    path = write_keyed(tmp_path / "r.jsonl")
    one, two = make(tmp_path / "one"), make(tmp_path / "two")
    reports = [tokenize(f, {"a": path}, jobs=jobs) for f, jobs in ((one, 1), (two, 2))]
    assert reports[0].replace(str(one), str(two)) == reports[1]
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    for file in one.iterdir():
        assert (two / file.name).read_bytes() == file.read_bytes()


def test_short_missing_long_and_broken_captions_are_kept_and_counted(tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    captions = {
        "one": b"word",
        "blank": b" \n\t ",
        "long": b"dog " * 100,
        "huge": b"cat " * 25_000,
        "latin": "caf\xe9 noir".encode("latin1"),
        "none": None,
        "latin end": "un caf\xe9".encode("latin1"),
        "cut inside a character": f"x{'é' * 40_000}".encode(),
    }
    with tarfile.open(folder / "0.tar", "w") as tar:
        for key, caption in captions.items():
            for extension, data in (("jpg", IMAGE.getvalue()), ("txt", caption)):
                if data is not None:
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    index(folder)
    report = tokenize(folder)
    assert report.splitlines()[2].split()[:5] == ["original", "2", "2", "3", "2"]
    table = open_dataset(folder).captions(0)
    lengths = [len(table.tokens(i, 0)) for i in range(6)]
    assert lengths[1] == lengths[5] == 0 and lengths[2] == 100 and lengths[3] == MAX_TOKENS
    assert [table.flags(i, 0) for i in range(6)] == [
        CAPTION_SHORT, CAPTION_MISSING, 0, 0, 0, CAPTION_MISSING,
    ]  # fmt: skip


def bad_file(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    return path


def parquet(texts, key="k0"):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"key": [key], "text": texts}), file)
    return file.getvalue()


BAD_FILES = {
    "no json": ("r.jsonl", b'{"key": "k0", "text": "x y"}\n{oops\n', r"r\.jsonl: line 2"),
    "no text": ("r.jsonl", b'{"key": "k0"}\n', "line 1"),
    "number for text": ("r.jsonl", b'{"key": "k0", "text": 3}\n', "line 1"),
    "latin-1": ("r.jsonl", '\n{"key": "é"}'.encode("latin1"), "line 2, byte 10: not UTF-8"),
    "empty": ("r.jsonl", b"", "no rewrites in it"),
    "columns": ("r.csv", b"id,words\n1,a b\n", r"columns \['id', 'words'\], expected key and text"),
    "long row": ("r.csv", b"key,text\nk0,a b\nk2,a dog, running\n", "line 3: 3 cells.* quotes"),
    "short row": ("r.csv", b"key,text\nk0,a b\nk2\n", "line 3: 1 cells"),
    "open quote": ("r.csv", b'key,text\nk0,"a b\n', r"r\.csv: line"),
    "latin-1 csv": ("r.csv", "key,text\nk0,é".encode("latin1"), "iconv -f latin1"),
    "bytes": ("r.parquet", parquet([b"caf\xe9"]), "row 0: its 'text' is not UTF-8"),
    "lists": ("r.parquet", parquet([["a dog", "a cat"]]), "column 'text' holds list"),
    "numbers": ("r.parquet", parquet(["a dog"], 12), "column 'key' holds int64, expected strings"),
    "no parquet": ("r.parquet", b"PAR1 nothing", "not Parquet"),
    "no original": ("r.txt", b"a line\n", "--original-csv"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_broken_file_of_rewrites_is_refused_and_changes_nothing(case, folder, tmp_path, capsys):
    tokenize(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    name, content, message = BAD_FILES[case]
    path = bad_file(tmp_path, name, content)
    assert main(["tokenize", str(folder), "--rewrites", f"a={path}", "--jobs", "1"]) == 2
    error = capsys.readouterr().err
    assert name in error and re.search(message, error) and "Traceback" not in error
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rewrites", "a"], "expected NAME=FILE"),
        (["--rewrites", "a=missing.jsonl"], "no such file"),
        (["--rewrites", "a=json:blip", "--rewrites", "a=r.jsonl"], "a is json:blip already"),
        (["--rewrites", "a=json:bilp"], "no KEY.json of"),
        (["--rewrites", "original=x.jsonl"], "original is the name of KEY.txt"),
        (["--drop", "b"], "the dataset has"),
        (["--tokenizer", "bert"], "bert"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, folder, capsys):
    assert main(["tokenize", str(folder), "--jobs", "1", *arguments]) == 2
    assert message in capsys.readouterr().err


def stop_halfway(folder, rewrites):
    """Leave a run of laclip tokenize that has done one shard of two."""
    aside = (folder / "1.tar").rename(folder / "aside")
    with pytest.raises(FileNotFoundError, match=r"1\.tar"):
        tokenize(folder, rewrites)
    aside.rename(folder / "1.tar")
    assert (folder / JOURNAL).exists()


def test_a_run_that_stopped_halfway_goes_on(folder, tmp_path):
    tokenize(folder, {"b": "json:blip"})
    whole = tmp_path / "whole"
    make(whole)
    path = write_keyed(tmp_path / "r.jsonl")
    tokenize(whole, {"b": "json:blip", "a": path})
    stop_halfway(folder, {"a": path})
    # Other arguments cannot use the half that is done, and say so.
    with pytest.raises(ValueError, match="another run of laclip tokenize stopped halfway"):
        tokenize(folder, {"c": path})
    tokenize(folder, {"a": path})
    assert not (folder / JOURNAL).exists()
    for file in whole.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()


def test_what_is_done_is_not_read_again(folder, tmp_path):
    """A run goes on without the tars of the shards that it has done, and reports as a whole one."""
    whole = make(tmp_path / "whole")
    rewrites = {"a": write_keyed(tmp_path / "r.jsonl"), "b": "json:blip"}
    report = tokenize(whole, rewrites)
    stop_halfway(folder, rewrites)
    (folder / "0.tar").write_bytes(bytes((folder / "0.tar").stat().st_size))
    assert tokenize(folder, rewrites).replace(str(folder), str(whole)) == report


def test_what_is_done_of_a_shard_that_was_replaced_is_done_again(folder, monkeypatch):
    stop_halfway(folder, {})
    monkeypatch.setitem(SAMPLES, "k0", ("a green dog", *SAMPLES["k0"][1:]))
    make(folder)  # and index: other samples than those of the half that is done
    tokenize(folder)
    assert texts(folder, "original")["k0"] == TOKENIZER.encode("a green dog")
    assert verify(folder) == []


def test_a_tar_that_was_replaced_since_it_was_indexed_is_refused(folder):
    tar = folder / "1.tar"
    tar.write_bytes(tar.read_bytes() + bytes(512))
    with pytest.raises(ValueError, match=r"1\.tar: \d+ bytes, \d+ when it was indexed. Run: lac"):
        tokenize(folder)


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_variants_are_not_kept_from_a_damaged_file(damage, folder, tmp_path, capsys):
    rewrites = tmp_path / "llm.jsonl"
    rewrites.write_text(
        "".join(json.dumps({"key": k, "text": t}) + "\n" for k, t in REWRITES.items())
    )
    tokenize(folder, {"llm": rewrites, "blip": "json:blip"})
    path = folder / "1.captions"
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(whole[:-1] + (bytes([whole[-1] ^ 4]) if damage == "flipped" else b""))
    assert main(["tokenize", str(folder), "--rewrites", "blip=json:blip", "--jobs", "1"]) == 2
    message = capsys.readouterr().err
    assert f"{path} is {'missing' if damage == 'missing' else 'damaged'}" in message
    assert "--rewrites" in message and "put the file back" in message
    assert verify(folder)
    # All variants named again bring back the very same file.
    tokenize(folder, {"llm": rewrites, "blip": "json:blip"})
    assert path.read_bytes() == whole and verify(folder) == []


def test_captions_of_another_tokenizer_are_not_kept(folder):
    tokenize(folder, {"b": "json:blip"})
    manifest = json.loads((folder / "dataset.json").read_text())
    manifest["tokenizer"] = "sentencepiece:0011"
    (folder / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"\['b'\] were tokenized with sentencepiece:0011"):
        tokenize(folder)
    tokenize(folder, {"b": "json:blip"})
    assert open_dataset(folder).tokenizer == TOKENIZER.fingerprint


def test_new_samples_ask_for_new_captions(folder, capsys):
    tokenize(folder)
    (folder / "1.tar").write_bytes((folder / "0.tar").read_bytes())
    assert main(["index", str(folder), "--force", "--jobs", "1"]) == 0
    assert "Run: laclip tokenize" in capsys.readouterr().out
    assert open_dataset(folder).variants == ()


@settings(max_examples=60)
@given(st.lists(st.tuples(st.text(max_size=3), st.text(max_size=5)), max_size=40))
def test_the_store_is_a_dictionary_whose_first_text_wins(tmp_path_factory, pairs):
    pairs = [(k, t) for k, t in pairs if k.isprintable() and t.isprintable()]
    place = tmp_path_factory.mktemp("store") / "s"
    build_store(place, pairs)
    store = TextStore(place)
    expected: dict = {}
    for key, text in pairs:
        expected.setdefault(key, text)
    asked = [*expected, "not there", None, *list(expected)[:2]]
    found, numbers = store.find(asked)
    assert found == [expected.get(key) for key in asked]
    assert {pairs[n] for n in numbers.tolist()} == set(expected.items())


def test_equal_hashes_are_told_apart_by_the_identity_itself(tmp_path, monkeypatch):
    from laclip.prepare import store as module

    monkeypatch.setattr(module, "hash_strings", lambda s: np.zeros(len(s), np.uint64))
    build_store(tmp_path / "s", [("a", "1"), ("b", "2"), ("c", "3")])
    assert TextStore(tmp_path / "s").find(["c", "a", "x", "b"])[0] == ["3", "1", None, "2"]


def test_an_index_that_loses_the_captions_names_the_variants_to_give_again(folder, tmp_path):
    write_keyed(tmp_path / "r.jsonl")
    tokenize(folder, {"llm": tmp_path / "r.jsonl", "blip": "json:blip"})
    assert index(folder).endswith("bad")
    again = index(folder, decode=True).splitlines()[-1]
    assert again.endswith(f"Run: laclip tokenize {folder} --rewrites llm=FILE --rewrites blip=FILE")
    (folder / "dataset.json").write_text("{")  # which alone has the names
    assert f"Run: laclip tokenize {folder}, with --rewrites NAME=FILE" in index(folder)


def test_a_field_is_found_in_json_of_any_length_and_missing_in_a_broken_one(tmp_path):
    long = {"exif": "x" * 100_000, "blip": "two dogs running"}  # img2dataset keeps EXIF data there
    jsons = {"a": json.dumps(long).encode(), "cut": b'{"blip": "two', "list": b"[1]", "none": b""}
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for key, extra in jsons.items():
            for extension, data in (("jpg", IMAGE.getvalue()), ("txt", b"a dog"), ("json", extra)):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    index(tmp_path)
    tokenize(tmp_path, {"blip": "json:blip"})
    expected = {"a": "two dogs running", "cut": None, "list": None, "none": None}
    assert texts(tmp_path, "blip") == encoded(expected)


@pytest.mark.parametrize("given", ["keys", "paths"])
def test_rewrites_of_which_no_sample_takes_any_are_refused(folder, tmp_path, given):
    tokenize(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    rewrites, more = tmp_path / "r.jsonl", {}
    rewrites.write_text('{"key": "000000007", "text": "a lazy dog"}\n')
    if given == "paths":
        (tmp_path / "original.csv").write_text("".join(f"img/x{i}.jpg,no\n" for i in range(9)))
        rewrites = tmp_path / "r.txt"
        rewrites.write_text("a lazy dog\n" * 9)
        more = {"original_csv": tmp_path / "original.csv", "join": "path"}
    with pytest.raises(ValueError, match="--rewrites llm: no sample of .* by its "):
        tokenize(folder, {"llm": rewrites}, **more)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
