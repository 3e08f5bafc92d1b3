"""Rotary position embedding: pairs (x_i, x_{i+K/2}) of a head turn by position · frequency_i.

Shapes: M rows, H heads, K head size. Source: Su et al. 2021 (RoFormer), in the half-split layout of
Hugging Face checkpoints; the Llama 3.1 stretch keeps short wavelengths, divides long ones by
`factor` and blends in between.
"""

import math

import torch
from torch import Tensor


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
