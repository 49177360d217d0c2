"""SentencePiece models behind the tokenizer's interface, with a model trained here."""

import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from laclip.tokenizer import load_tokenizer

GOLDEN = json.loads((Path(__file__).parent / "data" / "clip_tokens.json").read_text())["cases"]
CAPTIONS = (Path(__file__).parent / "data" / "captions.txt").read_text().splitlines()


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")

    def train(name, **options):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CAPTIONS),
            model_prefix=str(folder / name),
            vocab_size=600,
            byte_fallback=True,
            minloglevel=2,
            **options,
        )
        return str(folder / f"{name}.model")

    return train


@pytest.fixture(scope="module")
def model(train):
    return train("plain")


@pytest.fixture(scope="module")
def tokenizer(model):
    return load_tokenizer(f"sentencepiece:{model}")


def test_ids_equal_the_librarys(tokenizer, model):
    library = sentencepiece.SentencePieceProcessor(model_file=model)
    for text in CAPTIONS:
        assert tokenizer.encode(text) == library.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_any_text_is_encoded(tokenizer):
    texts = [text for text, _ in GOLDEN]
    tokens, offsets = tokenizer.encode_ragged(texts, num_threads=2)
    assert tokens.dtype == np.uint16
    for i, text in enumerate(texts):
        assert tokens[offsets[i] : offsets[i + 1]].tolist() == tokenizer.encode(text)
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")
    assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("😀")


def test_rows_hold_the_models_special_tokens(tokenizer, train):
    text = CAPTIONS[0]
    ids = tokenizer.encode(text)
    assert (tokenizer.sot_token, tokenizer.eot_token, tokenizer.pad_token) == (1, 2, 0)
    row = tokenizer.encode_batch([text], context_length=len(ids) + 4)[0]
    assert row.tolist() == [1, *ids, 2, 0, 0]
    cut = tokenizer.encode_batch([text], context_length=4)[0]
    assert cut.tolist() == [1, *ids[:2], 2]

    without = load_tokenizer("sentencepiece:" + train("eos", bos_id=-1, eos_id=1, pad_id=3))
    ids = without.encode(text)
    assert without.sot_token is None
    row = without.encode_batch([text], context_length=len(ids) + 3)[0]
    assert row.tolist() == [*ids, 1, 3, 3]


def test_limits_and_errors_are_those_of_clip(tokenizer):
    tokens, offsets = tokenizer.encode_ragged(CAPTIONS[:3], max_tokens=2)
    assert offsets.tolist() == [0, 2, 4, 6]
    assert tokens.tolist()[:2] == tokenizer.encode(CAPTIONS[0])[:2]
    with pytest.raises(TypeError, match="text 1 is a int, expected a str"):
        tokenizer.encode_batch(["a", 1])
    with pytest.raises(ValueError, match="found 600, expected 0 to 599"):
        tokenizer.decode([600])


def test_fingerprint_is_the_models(tokenizer, model, train):
    assert tokenizer.fingerprint == load_tokenizer(f"sentencepiece:{model}").fingerprint
    assert len(tokenizer.fingerprint) < 64
    other = load_tokenizer("sentencepiece:" + train("other", character_coverage=0.99))
    assert tokenizer.fingerprint != other.fingerprint


def test_a_model_that_cannot_serve_is_refused(train, tmp_path, model):
    with pytest.raises(FileNotFoundError, match=r"no\.model not found"):
        load_tokenizer(f"sentencepiece:{tmp_path / 'no.model'}")
    cut = tmp_path / "cut.model"
    cut.write_bytes(Path(model).read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cut.model \(1000 bytes\) is no SentencePiece model"):
        load_tokenizer(f"sentencepiece:{cut}")
    with pytest.raises(ValueError, match="no end-of-sentence piece"):
        load_tokenizer("sentencepiece:" + train("endless", eos_id=-1))
