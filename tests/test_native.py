"""The C++ core against independent implementations."""

import numpy as np
import pytest

from laclip import _native


@pytest.mark.parametrize("counter", [(0, 0, 0, 0), (1, 2, 3, 4), (2**64 - 2, 5, 2**63, 7)])
@pytest.mark.parametrize("key", [(0, 0), (2**64 - 1, 123456789)])
def test_philox_gives_numpys_words(counter, key):
    number = sum(word << (64 * i) for i, word in enumerate(counter))
    generator = np.random.Philox(counter=number - 1 if number else 2**256 - 1, key=list_to_int(key))
    assert list(_native.philox(list(counter), *key)) == generator.random_raw(4).tolist()


def list_to_int(words):
    return sum(word << (64 * i) for i, word in enumerate(words))


# Published in xxHash's sanity checks for the buffer of its own generator (seed 0) and well known
# for the empty input; "abc" from the reference implementation.
@pytest.mark.parametrize(
    ("text", "expected"), [(b"", 0xEF46DB3751D8E999), (b"abc", 0x44BC2CF5AD770999)]
)
def test_xxh64_gives_published_hashes(text, expected):
    assert _native.xxh64(np.frombuffer(text, np.uint8)) == expected


def test_xxh64_depends_on_every_byte():
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, 333, dtype=np.uint8)
    whole = _native.xxh64(data)
    for at in range(len(data)):
        flipped = data.copy()
        flipped[at] ^= 1
        assert _native.xxh64(flipped) != whole
