"""Attention calls against the row-by-row definition in float64."""

import pytest
import torch

from draftnorm.kernels.attention import attention_reference, block_attention, row_attention

SHAPES = [(4, 4, 8), (6, 2, 16), (9, 3, 64), (4, 1, 32)]  # query heads, key/value heads, head size


def random_heads(length: int, heads: tuple[int, int, int]) -> tuple[torch.Tensor, ...]:
    H, G, K = heads
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(length, H, K, generator=generator)
    return q, *torch.randn(2, length, G, K, generator=generator)


# fp32 attention over S ≤ 40 keys: scores carry K ≤ 64 roundings of 2⁻²⁴ of terms around 1, the
# weighted mean another S; 1e-5 leaves a factor of two.
TOLERANCE = dict(rtol=0, atol=1e-5)


@pytest.mark.parametrize("heads", SHAPES)
@pytest.mark.parametrize("window", [None, 1, 7, 40, 100])
@pytest.mark.parametrize("new", [1, 5, 40])
def test_block(heads: tuple[int, int, int], window: int | None, new: int) -> None:
    q, k, v = random_heads(40, heads)
    start = 40 - new
    expected = attention_reference(
        q[start:].double(), k.double(), v.double(), start=start, window=window
    )
    actual = block_attention(
        q[None, start:], k.transpose(0, 1)[None], v.transpose(0, 1)[None], window=window
    )
    torch.testing.assert_close(actual[0].double(), expected, **TOLERANCE)


@pytest.mark.parametrize("heads", SHAPES)
@pytest.mark.parametrize("window", [None, 1, 7])
def test_row(heads: tuple[int, int, int], window: int | None) -> None:
    q, k, v = random_heads(23, heads)
    expected = attention_reference(q.double(), k.double(), v.double(), window=window)
    keys, values = k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()
    for p in range(23):
        begin = 0 if window is None else max(0, p + 1 - window)
        actual = row_attention(q[p], keys, values, begin, p + 1)
        torch.testing.assert_close(actual.double(), expected[p], **TOLERANCE)


def test_block_gradient() -> None:
    q, k, v = (x.double().requires_grad_() for x in random_heads(12, (4, 2, 8)))
    block = block_attention(q[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], window=5)
    gradients = torch.autograd.grad(block[0].square().sum(), (q, k, v))
    # The reference fills rows in place, so differentiate each row's sum through a fresh copy.
    reference = attention_reference(q * 1, k, v, window=5)
    expected = torch.autograd.grad(reference.square().sum(), (q, k, v), allow_unused=True)
    for actual, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("K", [6, 14, 64])
def test_row_attention_does_not_depend_on_where_its_query_lies(K: int) -> None:
    torch.manual_seed(0)
    k, v, q = torch.randn(1, 41, K), torch.randn(1, 41, K), torch.randn(2, K)
    room = torch.empty(q.numel() + 16)
    for end in (2, 5, 13, 41):
        expected = row_attention(q, k, v, 0, end)
        for offset in range(16):
            there = room[offset : offset + q.numel()].view_as(q).copy_(q)
            assert torch.equal(row_attention(there, k, v, 0, end), expected)
