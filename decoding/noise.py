"""Philox4x32-10: random numbers that are a function of where they are used, not of who asked first.

A counter-based generator (Salmon, Moraes, Dror & Shaw, "Parallel Random Numbers: As Easy as
1, 2, 3", SC11) encrypts a counter under a key. Here the key is the seed and the counter says what
the number is for:

    key     = (seed mod 2³², seed div 2³²)
    counter = (absolute position, token id, stream, request id)
    u       = ((bits >> 9) + 0.5) · 2⁻²³         bits = first output word; 0 < u < 1, exact in fp32

The position is the one at which the sampled token will stand in the sequence. So plain decoding, a
verify of sixteen rows and a drafter all see the same noise for the same token at the same place,
which is what lets speculation reproduce sampled text bit for bit.
"""

from dataclasses import dataclass

import numpy as np

EXACT = 0  # the target's own samples, which an exact drafter shares
DRAFT = 1  # proposals under the rejection rule
ACCEPT = 2  # accept or reject
RESIDUAL = 3  # the residual distribution after a rejection, and the bonus token

# −log(−log u) is between −2.82 (u = 2⁻²⁴) and 16.64 (u = 1 − 2⁻²⁴); with room for rounding.
GUMBEL_RANGE = 19.5

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85  # golden ratio and √3 − 1, added to the key each round
_WORD = np.uint64(0xFFFFFFFF)
_ROUNDS = 10
_CHUNK = 8192  # tokens a pass: the ten rounds then stay in the L2 cache, twice as fast


def philox4x32(counter: tuple[np.ndarray, ...], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Ten rounds over four broadcastable uint64 arrays of 32-bit words; returns four such arrays.

    Words are kept in 64 bits so that a product needs no separate high half. Scalars stay scalars
    until they meet an array: with only the token id varying, the first rounds cost next to nothing.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0 = (product1 >> np.uint64(32)) ^ (c1 ^ np.uint64(k0))
        c2 = (product0 >> np.uint64(32)) ^ (c3 ^ np.uint64(k1))
        c1, c3 = product1 & _WORD, product0 & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & 0xFFFFFFFF, (k1 + _KEY_STEPS[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


@dataclass(frozen=True, slots=True)
class Noise:
    """The noise of one request. The request id is the caller's, never a batch slot."""

    seed: int  # 64 bits, which SamplingConfig has checked
    request_id: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.request_id < 2**32:
            raise ValueError(f"the request id must be in 0 … 2³² − 1, not {self.request_id}")

    def uniform(self, position: int, tokens: np.ndarray, stream: int) -> np.ndarray:
        """One fp32 number in (0, 1) for each token id at this position of this stream."""
        place, purpose, request = (
            np.full(1, word, dtype=np.uint64) for word in (position, stream, self.request_id)
        )
        key = self.seed & 0xFFFFFFFF, self.seed >> 32
        bits = np.empty(len(tokens), dtype=np.uint32)
        for start in range(0, len(tokens), _CHUNK):
            ids = tokens[start : start + _CHUNK].astype(np.uint64)
            bits[start : start + _CHUNK] = philox4x32((place, ids, purpose, request), key)[0]
        return ((bits >> np.uint32(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2**-23)

    def gumbel(self, position: int, tokens: np.ndarray, stream: int) -> np.ndarray:
        """Standard Gumbel noise, −log(−log u): argmax(log w + noise) draws from weights w."""
        return -np.log(-np.log(self.uniform(position, tokens, stream)))
