"""Rotary position embedding: pairs (x_i, x_{i+K/2}) of a head turn by position · frequency_i.

Shapes: M rows, H (query) heads, G key/value heads, N = H + 2G heads of q, k and v, K head size,
B sequences and S positions of a cache. Source: Su et al. 2021 (RoFormer), in the half-split layout
of Hugging Face checkpoints; the Llama 3.1 stretch keeps short wavelengths, divides long ones by
`factor` and blends in between.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from draftnorm.kernels.compilation import launch

HEADS = 16  # that a program turns
Pair = tuple[Tensor, Tensor]  # cosine and signed sine (rotary_table), or keys and values


def inverse_frequencies(
    head_size: int,
    theta: float,
    kind: str = "default",
    factor: float = 1.0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    original_context: int = 8192,
) -> Tensor:
    """Angle per position of each pair, fp32 [K/2]: theta^(-2i/K), stretched by `kind`.

    "dynamic" changes nothing up to the trained context, to which we hold it.
    """
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
    frequencies = 1.0 / theta**exponents
    if kind == "linear":
        return frequencies / factor
    if kind == "llama3":
        turns = original_context * frequencies / (2 * math.pi)  # within the original context
        keep = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
        keep = keep.clamp(0.0, 1.0)
        return (1 - keep) * frequencies / factor + keep * frequencies
    return frequencies


def rotary_reference(x_MHK: Tensor, positions_M: Tensor, frequencies: Tensor) -> Tensor:
    """The definition: each pair as a complex number, turned; in float64."""
    first, second = x_MHK.double().chunk(2, dim=-1)
    angles = positions_M.double()[:, None] * frequencies.double()
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


def rotary_table(positions_M: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of every row and dimension, fp32 [M, 1, K], for `apply_rotary`."""
    angles = positions_M.to(torch.float32)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]


def apply_rotary(x_MHK: Tensor, cos_M1K: Tensor, sin_M1K: Tensor) -> Tensor:
    """Turn each head of each row; computed in fp32, returned in the dtype of `x_MHK`."""
    x = x_MHK.float()
    first, second = x.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    return torch.addcmul(x * cos_M1K, swapped, sin_M1K).to(x_MHK.dtype)


def rotate_heads(qkv_MNK: Tensor, table: Pair, G: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [M, H, K] and k [M, G, K], both turned by a rotary_table, and v [M, G, K]."""
    turned = apply_rotary(qkv_MNK[:, :-G], *table)
    return turned[:, :-G], turned[:, -G:], qkv_MNK[:, -G:]


@triton.jit(do_not_specialize=["b", "start", "S"])
def _rotate_into_cache_kernel(
    qkv_ptr, cos_ptr, sin_ptr, key_ptr, value_ptr, b, start, S,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    HALF: tl.constexpr = K // 2
    pair = tl.arange(0, triton.next_power_of_2(HALF))[None, :]
    ok = (head < H + 2 * G) & (pair < HALF)
    first_ptrs = qkv_ptr + (row * (H + 2 * G) + head) * K + pair
    first = tl.load(first_ptrs, mask=ok, other=0.0).to(tl.float32)
    second = tl.load(first_ptrs + HALF, mask=ok, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + row * K + pair, mask=pair < HALF, other=0.0)
    sin = tl.load(sin_ptr + row * K + HALF + pair, mask=pair < HALF, other=0.0)
    # Explicit fma, as the compiler would contract one layout's products otherwise than another's.
    is_value = head >= H + G
    low = tl.where(is_value, first, tl.fma(-second, sin, first * cos))
    high = tl.where(is_value, second, tl.fma(first, sin, second * cos))
    group = tl.where(is_value, head - G, head) - H
    slot = ((b.to(tl.int64) * G + group) * S + start + row) * K + pair
    cached_ptrs = tl.where(is_value, value_ptr + slot, key_ptr + slot)
    ptrs = tl.where(head < H, first_ptrs, cached_ptrs)
    tl.store(ptrs, low.to(qkv_ptr.dtype.element_ty), mask=ok)
    tl.store(ptrs + HALF, high.to(qkv_ptr.dtype.element_ty), mask=ok)


def rotate_into_cache_forward(
    qkv_MNK: Tensor, table: Pair, cache: Pair, b: int, start: int
) -> Tensor:
    """Launch the kernel of `rotate_into_cache` on contiguous tensors; q is turned in place."""
    (M, N, K), (_, G, S, _) = qkv_MNK.shape, cache[0].shape
    tensors = (qkv_MNK, *table, *cache)
    assert all(x.is_contiguous() for x in tensors)
    constants = (N - 2 * G, G, K, HEADS)
    alignments = (x.data_ptr() % 16 for x in tensors)
    key = (qkv_MNK.get_device(), "rotate", qkv_MNK.dtype, *constants, *alignments)
    args, grid = (*tensors, b, start, S, *constants), (M, -(-N // HEADS), 1)
    launch(_rotate_into_cache_kernel, grid, args, key=key, warps=4)
    return qkv_MNK[:, : N - 2 * G]


def rotate_into_cache(qkv_MNK: Tensor, table: Pair, cache: Pair, b: int, start: int) -> Tensor:
    """`rotate_heads` of M positions from `start` on, whose k and v go to a cache; q [M, H, K].

    The cache is keys and values [B, G, S, K], of which sequence `b` is written. Not differentiable;
    on CUDA `qkv_MNK` itself receives q.
    """
    if qkv_MNK.is_cuda:
        return rotate_into_cache_forward(qkv_MNK, table, cache, b, start)
    q_MHK, *new = rotate_heads(qkv_MNK, table, cache[0].shape[1])
    for cached_BGSK, new_MGK in zip(cache, new, strict=True):
        cached_BGSK[b, :, start : start + len(new_MGK)] = new_MGK.transpose(0, 1)
    return q_MHK
