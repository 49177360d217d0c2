"""laclip.tokenizer: OpenAI's ids, and what its interface promises."""

import gzip
import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import laclip._native as _native
from laclip.tokenizer import VOCABULARY, ReferenceTokenizer, load_tokenizer, read_merges

# Written by OpenAI's own SimpleTokenizer; the file says with which versions of its libraries.
GOLDEN = json.loads((Path(__file__).parent / "data" / "clip_tokens.json").read_text())["cases"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def reference():
    return ReferenceTokenizer()


def test_ids_equal_openais(tokenizer):
    for text, ids in GOLDEN:
        assert tokenizer.encode(text) == ids, ascii(text)


def test_reference_ids_equal_openais(reference):
    for text, ids in GOLDEN:
        assert reference.encode(text) == ids, ascii(text)


def test_decode_equals_reference(tokenizer, reference):
    for _, ids in GOLDEN:
        assert tokenizer.decode(ids) == reference.decode(ids)


def test_rows_start_end_and_are_cut_and_padded(tokenizer):
    words = [320, 539, 320, 539, 320]
    texts = ["", "a of", "a of a", "a of a of a"]
    rows = tokenizer.encode_batch(texts, context_length=5)
    assert rows.dtype == np.int32
    assert rows.tolist() == [
        [49406, 49407, 0, 0, 0],
        [49406, *words[:2], 49407, 0],
        [49406, *words[:3], 49407],
        [49406, *words[:3], 49407],
    ]


@pytest.mark.parametrize("num_threads", [1, 2, 8])
def test_batch_and_ragged_equal_encode(tokenizer, num_threads):
    texts = [text for text, _ in GOLDEN] * 4
    expected = [tokenizer.encode(text) for text in texts]
    tokens, offsets = tokenizer.encode_ragged(texts, num_threads=num_threads)
    assert tokens.dtype == np.uint16
    assert offsets.dtype == np.int64
    rows = tokenizer.encode_batch(texts, num_threads=num_threads)
    for i, ids in enumerate(expected):
        assert tokens[offsets[i] : offsets[i + 1]].tolist() == ids
        row = [tokenizer.sot_token, *ids[:75], tokenizer.eot_token]
        assert rows[i].tolist() == row + [0] * (77 - len(row))


@pytest.mark.parametrize("max_tokens", [0, 1, 7, 1000])
def test_max_tokens_keeps_the_first_ids(tokenizer, max_tokens):
    tokens, offsets = tokenizer.encode_ragged([t for t, _ in GOLDEN], max_tokens=max_tokens)
    for i, (_, ids) in enumerate(GOLDEN):
        assert tokens[offsets[i] : offsets[i + 1]].tolist() == ids[:max_tokens]


def test_out_is_filled_and_returned(tokenizer):
    out = np.full((2, 9), -1, np.int32)
    assert tokenizer.encode_batch(["a cat", "é" * 50], context_length=9, out=out) is out
    assert (out == tokenizer.encode_batch(["a cat", "é" * 50], context_length=9)).all()


def test_no_text_gives_no_row(tokenizer):
    assert tokenizer.encode_batch([]).shape == (0, 77)
    tokens, offsets = tokenizer.encode_ragged([])
    assert tokens.size == 0
    assert offsets.tolist() == [0]


def test_a_generator_of_texts_is_read_once(tokenizer):
    assert tokenizer.encode_batch(text for text in ["a", "b"]).shape == (2, 77)


def test_what_is_not_a_str_is_named(tokenizer):
    with pytest.raises(TypeError, match="text 1 is a bytes, expected a str"):
        tokenizer.encode_batch(["a", b"b"])
    with pytest.raises(TypeError, match="text 0 is a NoneType, expected a str"):
        tokenizer.encode(None)
    with pytest.raises(TypeError, match=r"pass \[text\]"):
        tokenizer.encode_batch("a cat")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context_length": 2}, "context_length: found 2, expected 3 or more"),
        ({"num_threads": 0}, "num_threads: found 0"),
        ({"out": np.zeros((1, 76), np.int32)}, r"found shape \(1, 76\), expected \(1, 77\)"),
        ({"out": np.zeros((1, 77), np.int64)}, "found int64, expected a NumPy array of int32"),
        ({"out": [0] * 77}, "found list"),
        ({"out": np.zeros((1, 154), np.int32)[:, ::2]}, "strided or read-only"),
    ],
)
def test_bad_arguments_are_named(tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.encode_batch(["a cat"], **arguments)


def test_an_unknown_spec_is_refused():
    with pytest.raises(ValueError, match="found 'bert', expected 'clip' or 'sentencepiece:FILE'"):
        load_tokenizer("bert")


@pytest.mark.parametrize("token", [-1, 49408])
def test_decode_refuses_an_id_outside_the_vocabulary(tokenizer, token):
    with pytest.raises(ValueError, match=f"found {token}, expected 0 to 49407"):
        tokenizer.decode([token])


def test_fingerprint_fits_the_caption_store(tokenizer):
    assert tokenizer.fingerprint == load_tokenizer("clip").fingerprint
    assert tokenizer.fingerprint.startswith("clip:")
    assert len(tokenizer.fingerprint) == len("clip:") + 16


def test_a_damaged_vocabulary_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is missing"):
        read_merges(tmp_path / "none.txt.gz")
    cut = tmp_path / "cut.txt.gz"
    cut.write_bytes(VOCABULARY.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=r"has sha256 [0-9a-f]{64} \(1356916 bytes\), expected 9246"
    ):
        read_merges(cut)
    other = tmp_path / "other.txt.gz"
    other.write_bytes(gzip.compress(gzip.decompress(VOCABULARY.read_bytes())))
    with pytest.raises(ValueError, match="has sha256"):
        read_merges(other)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["#version", "i n", "t h"], "line 4: missing, the file is cut"),
        (["#version", "i n", "nonsense"], "line 3: not two symbols"),
        (["#version", "i n", "in gone"], "line 3: symbol not made by a line above"),
        (["#version", "i n", "i n"], "line 3: symbol made twice"),
    ],
)
def test_merges_that_cannot_be_are_refused_by_line(lines, message):
    with pytest.raises(ValueError, match=message):
        _native.Bpe("\n".join(lines).encode())


def test_other_threads_run_while_texts_are_encoded(tokenizer):
    # At this interval a thread gets the interpreter only when another gives it up.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    ran, seen = [], []

    def encode():
        for _ in range(100):  # until this one has got a core meanwhile
            tokenizer.encode_ragged(["ab" * 100_000])
            if ran:
                break
        seen.extend(ran)

    try:
        worker = threading.Thread(target=encode)
        worker.start()
        ran.append(True)
        worker.join()
    finally:
        sys.setswitchinterval(interval)
    assert seen == [True]
