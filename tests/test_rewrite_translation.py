"""Back-translation with the real Apertium, and with translation models of a real kind."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from laclip.cli import main
from laclip.rewrite.translation import BackTranslation, translate

# Two Marian models with random weights and tokenizers learned from captions; then each caption
# translated alone, there and back, by transformers' own generate.
BUILD = """
import io, json, sys
from pathlib import Path
import sentencepiece, torch, transformers

there, back, captions = map(Path, sys.argv[1:])
lines = captions.read_text().splitlines()
models = []
for number, folder in enumerate((there, back)):
    folder.mkdir()
    learned = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=learned, vocab_size=200 + number, minloglevel=2
    )
    for name in ("source.spm", "target.spm"):
        (folder / name).write_bytes(learned.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=learned.getvalue())
    words = [pieces.id_to_piece(i) for i in range(len(pieces))]
    words = ["</s>", "<unk>", *(w for w in words if w not in ("<s>", "</s>", "<unk>")), "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    torch.manual_seed(number)
    pad = len(words) - 1
    model = transformers.MarianMTModel(transformers.MarianConfig(
        vocab_size=len(words), d_model=32, encoder_layers=1, decoder_layers=1, init_std=0.5,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
        decoder_ffn_dim=64, max_position_embeddings=300, pad_token_id=pad, eos_token_id=0,
        decoder_start_token_id=pad, forced_eos_token_id=None,
    ))
    model.final_logits_bias[0, 0] = 9.0 - 3 * number  # or it would hardly ever end
    model.generation_config.num_beams = 2
    model.save_pretrained(folder)
    names = [str(folder / name) for name in ("source.spm", "target.spm", "vocab.json")]
    tokenizer = transformers.MarianTokenizer(*names)
    tokenizer.save_pretrained(folder)
    models.append((tokenizer, model.eval()))
found = []
for text in lines[:16]:
    for tokenizer, model in models:
        given = tokenizer([text], truncation=True, max_length=256, return_tensors="pt")
        ids = model.generate(**given, num_beams=1, max_new_tokens=256)
        text = tokenizer.decode(ids[0], skip_special_tokens=True).strip()
    found.append(text)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def apertium():
    """Debian's apertium-eng-spa (7 MB), installed where it is not there."""
    if not shutil.which("apertium"):
        apt_get = ["apt-get", "-q", "-o", "Acquire::Retries=5"]
        subprocess.run([*apt_get, "update"], check=True)
        words = ["install", "-y", "--no-install-recommends", "apertium-eng-spa"]
        subprocess.run([*apt_get, *words], check=True)
    return BackTranslation("spa")


def test_each_line_is_translated_and_keeps_its_place(apertium):
    lines = ["a red house", "a [strange] ^line$ {of} <marks> @ / \\ 50%", "🙂", "a white dog"]
    found = translate(lines, "eng-spa")
    assert found[0] == "una casa roja" and found[3] == "un perro blanco"
    assert [c for c in found[1] if c in "[]^${}<>@/\\%"] == list("[]^${}<>@/\\%")
    assert found[2] == "🙂"
    assert translate(found, "spa-eng")[3] == "a white dog"


def test_lines_do_not_depend_on_their_neighbours(apertium):
    # Between some of these, Apertium moves words when lines follow each other closely.
    lines = (Path(__file__).parent / "data" / "captions.txt").read_text().split("\n")
    together = translate(lines[:300], "eng-spa")
    assert together[1:10] == [translate([line], "eng-spa")[0] for line in lines[1:10]]
    assert together == [*translate(lines[:130], "eng-spa"), *translate(lines[130:300], "eng-spa")]
    assert sum(a != b for a, b in zip(together, lines, strict=False)) > 290


def test_backtranslation_writes_rewrites_like_any_engine(apertium, emoji_copy, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["rewrite", str(emoji_copy), str(out), "--method", "backtranslate"]) == 0
    rewrites = [json.loads(line) for line in (out / "rewrites.jsonl").open()]
    echoes = json.loads((out / "finished.jsonl").read_text().splitlines()[0])["rejected"]["echo"]
    assert len(rewrites) > 500 and echoes > 50  # short names often come back as they were
    assert rewrites[0]["model"] == "backtranslate spa"
    words = ["tokenize", str(emoji_copy), "--rewrites", f"back={out / 'rewrites.jsonl'}"]
    assert main(words) == 0


def test_missing_language_is_named_with_its_package(apertium, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a red door\n")
    words = ["rewrite", str(tmp_path / "a.txt"), str(tmp_path / "out")]
    assert main([*words, "--method", "backtranslate", "--through", "tlh"]) == 2
    said = capsys.readouterr().err
    assert "eng-tlh" in said and "apt-get install apertium-eng-tlh" in said


def test_translation_models_translate_each_caption_there_and_back(environment, tmp_path):
    lines = (Path(__file__).parent / "data" / "captions.txt").read_text().split("\n")
    captions = [line for line in lines if 10 < len(line) < 60 and line.isascii()][:40]
    source, folders = tmp_path / "a.txt", [tmp_path / "en-xx", tmp_path / "xx-en"]
    source.write_text("\n".join(captions))

    def run(*words):
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    expected = json.loads(run("-c", BUILD, *folders, source).splitlines()[-1])
    source.write_text("\n".join(captions[:16]))
    words = ["-m", "laclip.cli", "rewrite", source, tmp_path / "out", "--method", "backtranslate"]
    run(*words, "--translators", *folders, "--batch-size", 8)
    entries = [
        json.loads(line)
        for kind in ("shards", "rejects")
        for line in (tmp_path / "out" / kind / "a.jsonl").open()
    ]
    texts = {entry["key"]: entry["text"] for entry in entries}
    assert [texts[str(i)] for i in range(16)] == expected
    assert len(set(expected)) > 6  # the models answer to what they are given
    assert {entry["model"] for entry in entries} == {"backtranslate en-xx xx-en"}
    counts = json.loads((tmp_path / "out" / "finished.jsonl").read_text())
    assert counts["tokens"] > 32
