"""Philox against the known answers of its authors, and the map from counters to numbers."""

import numpy as np
import pytest

from draftnorm.decoding.noise import ACCEPT, EXACT, Noise, philox4x32

# counter, key, output: kat_vectors of Random123 1.14 (Salmon et al. 2011), "philox4x32 10".
KNOWN_ANSWERS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, answer: str) -> None:
    arrays = tuple(np.array([word], dtype=np.uint64) for word in words(counter))
    assert [int(word[0]) for word in philox4x32(arrays, tuple(words(key)))] == words(answer)


def test_counter_and_key_layout() -> None:
    """(position, token, stream, request) under (low, high word of the seed): the third vector."""
    noise = Noise(seed=0x299F31D0_A4093822, request_id=0x03707344)
    u = noise.uniform(0x243F6A88, np.array([0x85A308D3]), 0x13198A2E)[0]
    assert u == ((0xD16CFE09 >> 9) + 0.5) * 2**-23


def test_numbers_do_not_depend_on_the_company() -> None:
    """A token's number is the same drawn alone or among others, across internal chunks too."""
    noise = Noise(seed=1)
    together = noise.gumbel(7, np.arange(20_000), EXACT)
    for token in (0, 1, 8191, 8192, 19_999):
        assert noise.gumbel(7, np.array([token]), EXACT)[0] == together[token]


def test_every_coordinate_counts() -> None:
    tokens = np.arange(64)
    base = Noise(5).uniform(3, tokens, EXACT)
    for other in (
        Noise(6).uniform(3, tokens, EXACT),
        Noise(5 + 2**32).uniform(3, tokens, EXACT),
        Noise(5, request_id=1).uniform(3, tokens, EXACT),
        Noise(5).uniform(4, tokens, EXACT),
        Noise(5).uniform(3, tokens, ACCEPT),
        Noise(5).uniform(3, tokens + 64, EXACT),
    ):
        assert (base == other).sum() == 0


def test_uniform_is_open_and_uniform() -> None:
    u = Noise(0).uniform(0, np.arange(200_000), EXACT)
    assert u.dtype == np.float32
    assert u.min() > 0 and u.max() < 1
    # χ² over 16 bins, 15 degrees of freedom: 37.7 is the 99.9 % point.
    counts = np.histogram(u, bins=16, range=(0, 1))[0]
    assert ((counts - len(u) / 16) ** 2 / (len(u) / 16)).sum() < 37.7


def test_extreme_bits_stay_inside() -> None:
    """The formula at the ends of its range, in fp32: nothing rounds to 0 or 1."""
    ends = (np.array([0, 2**23 - 1], dtype=np.float32) + np.float32(0.5)) * np.float32(2**-23)
    assert ends[0] == 2**-24 and ends[1] == 1 - 2**-24
    assert np.isfinite(-np.log(-np.log(ends))).all()


@pytest.mark.parametrize("request_id", [-1, 2**32])
def test_out_of_range(request_id: int) -> None:
    with pytest.raises(ValueError, match=r"must be in 0 …"):
        Noise(0, request_id)
