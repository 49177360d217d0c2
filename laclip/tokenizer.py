"""Texts to token ids and back: CLIP's byte-pair vocabulary, or a SentencePiece model.

The CLIP tokenizer gives the ids of OpenAI's SimpleTokenizer (github.com/openai/CLIP,
clip/simple_tokenizer.py) for every Python string. `csrc/` does the work; `ReferenceTokenizer` is
its slow and obvious twin, which the tests hold it to.
"""

import hashlib
import itertools
import zlib
from pathlib import Path

import numpy as np

import laclip._native as _native
from laclip.text_clean import character_table, clean_text, resolve_entities, split_words

VOCABULARY = Path(__file__).parent / "vocab" / "bpe_simple_vocab_16e6.txt.gz"
VOCABULARY_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
RULES = 1  # raised whenever the ids of any text change
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")


def load_tokenizer(spec="clip"):
    """The tokenizer that `spec` names: "clip", or "sentencepiece:FILE".

    Raises ValueError for another spec, FileNotFoundError or ValueError where a vocabulary is
    missing or damaged.
    """
    if spec == "clip":
        return Tokenizer()
    if spec.startswith("sentencepiece:"):
        return SentencePieceTokenizer(spec.removeprefix("sentencepiece:"))
    raise ValueError(f"tokenizer: found {spec!r}, expected 'clip' or 'sentencepiece:FILE'")


def read_merges(path=VOCABULARY):
    """The merges in the vocabulary file, as bytes, its known hash checked."""
    try:
        packed = Path(path).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"CLIP's vocabulary {path} is missing. Reinstall laclip, which carries it."
        ) from None
    found = hashlib.sha256(packed).hexdigest()
    if found != VOCABULARY_SHA256:
        raise ValueError(
            f"CLIP's vocabulary {path} has sha256 {found} ({len(packed)} bytes), expected "
            f"{VOCABULARY_SHA256}. Reinstall laclip, which carries it."
        )
    # CLIP uses the first fifth of the lines: 0.6 MB of 3.2, in 2 ms where all takes 13.
    return zlib.decompressobj(wbits=31).decompress(packed, 600_000)


def _as_strings(texts):
    if isinstance(texts, str):
        raise TypeError("found one str, expected several: pass [text]")
    return tuple(texts)


class Tokenizer:
    """CLIP's byte-pair encoding. Immutable: one instance serves any number of threads."""

    def __init__(self):
        self._bpe = _native.Bpe(read_merges())
        self._table = None  # of characters beyond ASCII, made when the first comes
        self._table_made = False
        self.vocab_size = 49408
        self.sot_token = 49406
        self.eot_token = 49407
        self.pad_token = 0
        rules = f"{VOCABULARY_SHA256} rules {RULES}".encode()
        self.fingerprint = f"clip:{hashlib.sha256(rules).hexdigest()[:16]}"

    def encode(self, text):
        """The ids of one text, without special tokens, as a list."""
        return self.encode_ragged([text])[0].tolist()

    def encode_batch(self, texts, context_length=77, num_threads=1, out=None):
        """Rows of equal length: start of text, ids, end of text, zeros.

        texts: any iterable of str; context_length: at least 3; a longer text is cut, its row still
        ends in the end of text; out: a C-contiguous int32 array [texts, context_length] to fill.
        Returns int32 [texts, context_length], `out` where it was given.
        Raises TypeError for what is not a str, ValueError for a bad length or `out`.
        """
        texts = _as_strings(texts)
        out = _rows(len(texts), context_length, num_threads, out)
        self._encode_padded(texts, self._first_form(), out, num_threads)
        return out

    def encode_ragged(self, texts, num_threads=1, max_tokens=None):
        """All ids in one array, without special tokens or padding.

        texts: any iterable of str; max_tokens: keep at most so many ids of a text.
        Returns (tokens uint16 [total], offsets int64 [texts + 1]): text i has
        tokens[offsets[i]:offsets[i + 1]].
        """
        texts = _as_strings(texts)
        _check_limits(num_threads, max_tokens)
        max_tokens = 2**62 if max_tokens is None else max_tokens
        tokens, lengths = self._encode_ragged(texts, self._first_form(), max_tokens, num_threads)
        offsets = np.zeros(len(texts) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return tokens, offsets

    # A text that C++ cannot clean comes back in the next form: as it is, as it is with the table
    # of characters, with its entities resolved, as the words that the slow path makes of it.
    def _first_form(self):
        return 1 if self._table_made else 0

    def _in_form(self, texts, form):
        """(table, texts, whether these are words): what C++ is given."""
        if form == 1 and not self._table_made:
            arrays = character_table()
            self._table = None if arrays is None else _native.CharacterTable(*arrays)
            self._table_made = True
        if form == 2 and self._table is not None:
            texts = tuple(map(resolve_entities, texts))
        return (self._table, texts, False) if form < 3 else (None, _joined_words(texts), True)

    def _encode_padded(self, texts, form, out, num_threads):
        table, given, words = self._in_form(texts, form)
        unclean = self._bpe.encode_padded(table, given, words, out, num_threads)
        if len(unclean):
            rows = np.empty((len(unclean), out.shape[1]), np.int32)
            rest = tuple(texts[i] for i in unclean.tolist())
            self._encode_padded(rest, form + 1, rows, num_threads)
            out[unclean] = rows

    def _encode_ragged(self, texts, form, max_tokens, num_threads):
        table, given, words = self._in_form(texts, form)
        tokens, lengths, unclean = self._bpe.encode_ragged(
            table, given, words, max_tokens, num_threads
        )
        if len(unclean):
            rest = tuple(texts[i] for i in unclean.tolist())
            inserted, counts = self._encode_ragged(rest, form + 1, max_tokens, num_threads)
            places = np.cumsum(lengths)[unclean]  # a text to clean has no tokens yet
            tokens = np.insert(tokens, np.repeat(places, counts), inserted)
            lengths[unclean] = counts
        return tokens, lengths

    def decode(self, ids):
        """The text of ids, cleaned as it was: lower case, a space after each word. Bytes that are
        no UTF-8 become U+FFFD. Raises ValueError for an id outside the vocabulary."""
        ids = _checked_ids(ids, self.vocab_size)
        text = b"".join(map(self._bpe.bytes_of, ids)).decode(errors="replace")
        return text.replace("</w>", " ")


class SentencePieceTokenizer:
    """A SentencePiece model (github.com/google/sentencepiece) behind Tokenizer's interface.

    The text is left as it is: the model's own normalizer does what it was trained with; a lone
    surrogate, which has no UTF-8, counts as U+FFFD. `sot_token` is the model's BOS, None where it
    has none (rows then begin with the text); `eot_token` its EOS, which it must have; `pad_token`
    its PAD, else 0.
    """

    def __init__(self, path):
        import sentencepiece

        try:
            model = Path(path).read_bytes()
        except FileNotFoundError:
            raise FileNotFoundError(f"tokenizer: SentencePiece model {path} not found") from None
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError(
                f"tokenizer: {path} ({len(model)} bytes) is no SentencePiece model: {error}"
            ) from None
        self.vocab_size = self._pieces.get_piece_size()
        self.sot_token = self._pieces.bos_id() if self._pieces.bos_id() >= 0 else None
        self.eot_token = self._pieces.eos_id()
        self.pad_token = max(self._pieces.pad_id(), 0)
        if self.eot_token < 0:
            raise ValueError(f"tokenizer: {path} has no end-of-sentence piece; train it with one")
        self.fingerprint = f"sentencepiece:{hashlib.sha256(model).hexdigest()[:16]}"

    def encode(self, text):
        """The ids of one text, without special tokens, as a list."""
        return self._encode_all([text], 1)[0]

    def encode_batch(self, texts, context_length=77, num_threads=1, out=None):
        """As Tokenizer.encode_batch, with this model's special tokens."""
        texts = _as_strings(texts)
        out = _rows(len(texts), context_length, num_threads, out)
        out[:] = self.pad_token
        start = [] if self.sot_token is None else [self.sot_token]
        for row, ids in zip(out, self._encode_all(texts, num_threads)):
            ids = [*start, *ids][: context_length - 1]
            row[: len(ids)] = ids
            row[len(ids)] = self.eot_token
        return out

    def encode_ragged(self, texts, num_threads=1, max_tokens=None):
        """As Tokenizer.encode_ragged; tokens are uint32 where the vocabulary passes 65,536."""
        _check_limits(num_threads, max_tokens)
        rows = [ids[:max_tokens] for ids in self._encode_all(_as_strings(texts), num_threads)]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(ids) for ids in rows], out=offsets[1:])
        dtype = np.uint16 if self.vocab_size <= 65536 else np.uint32
        return np.fromiter(itertools.chain.from_iterable(rows), dtype, offsets[-1]), offsets

    def decode(self, ids):
        """The text of ids. Raises ValueError for an id outside the vocabulary."""
        return self._pieces.decode(_checked_ids(ids, self.vocab_size))

    def _encode_all(self, texts, num_threads):
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"text {i} is a {type(text).__name__}, expected a str")
        texts = [
            text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts
        ]
        return self._pieces.encode(texts, out_type=int, num_threads=num_threads)


class ReferenceTokenizer:
    """The slow twin of Tokenizer: the same ids and nothing but Python.

    symbols: the vocabulary by id, as the file writes it. ranks: each merge's place in the file.
    """

    def __init__(self):
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        # The file writes byte b as the character names[b]; ids follow the order of the dict.
        names = {byte: chr(byte) for byte in printable}
        names |= {byte: chr(0x100 + i) for i, byte in enumerate(others)}
        merges = [
            tuple(line.split()) for line in read_merges().decode().split("\n")[1 : 49152 - 256 - 1]
        ]
        symbols = [*names.values(), *(name + "</w>" for name in names.values())]
        symbols += ["".join(merge) for merge in merges]
        symbols += SPECIAL_TOKENS
        self._names = names
        self._bytes = {name: byte for byte, name in names.items()}
        self._ids = {symbol: i for i, symbol in enumerate(symbols)}
        self.symbols = symbols
        self.ranks = {merge: rank for rank, merge in enumerate(merges)}

    def encode(self, text):
        """The ids of one text, without special tokens, as a list."""
        ids = []
        for word in split_words(clean_text(text)):
            ids += self._encode_word("".join(self._names[byte] for byte in word.encode()))
        return ids

    def _encode_word(self, word):
        if word in SPECIAL_TOKENS:
            return [self._ids[word]]
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pairs = set(itertools.pairwise(parts))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            merged = []
            i = 0
            while i < len(parts):
                if tuple(parts[i : i + 2]) == best:
                    merged.append(parts[i] + parts[i + 1])
                    i += 2
                else:
                    merged.append(parts[i])
                    i += 1
            parts = merged
        return [self._ids[part] for part in parts]

    def decode(self, ids):
        """The text of ids, as Tokenizer.decode gives it."""
        text = "".join(self.symbols[i] for i in ids)
        return bytes(self._bytes[c] for c in text).decode(errors="replace").replace("</w>", " ")


def _joined_words(texts):
    # A word has no white space, so a space can stand between two.
    return tuple(" ".join(split_words(clean_text(text))) for text in texts)


def _check_limits(num_threads, max_tokens=None):
    if num_threads < 1:
        raise ValueError(f"num_threads: found {num_threads}, expected 1 or more")
    if max_tokens is not None and max_tokens < 0:
        raise ValueError(f"max_tokens: found {max_tokens}, expected 0 or more")


def _rows(count, context_length, num_threads, out):
    _check_limits(num_threads)
    if context_length < 3:
        raise ValueError(f"context_length: found {context_length}, expected 3 or more")
    if out is None:
        return np.empty((count, context_length), np.int32)
    if not isinstance(out, np.ndarray) or out.dtype != np.int32:
        found = out.dtype if isinstance(out, np.ndarray) else type(out).__name__
        raise ValueError(f"out: found {found}, expected a NumPy array of int32")
    if out.shape != (count, context_length):
        raise ValueError(f"out: found shape {out.shape}, expected {(count, context_length)}")
    if not out.flags.c_contiguous or not out.flags.writeable:
        raise ValueError("out: found a strided or read-only array, expected one that is writeable")
    return out


def _checked_ids(ids, vocab_size):
    ids = [int(i) for i in ids]
    for i in ids:
        if not 0 <= i < vocab_size:
            raise ValueError(f"token id: found {i}, expected 0 to {vocab_size - 1}")
    return ids
