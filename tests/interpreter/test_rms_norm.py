"""The RMSNorm kernels in Triton's interpreter: tiny shapes on the CPU against float64."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from draftnorm.kernels.residual_rms_norm import _ResidualRMSNorm, residual_rms_norm_forward
from draftnorm.kernels.rms_norm import (
    CASTING_MODES,
    _RMSNorm,
    rms_norm_backward,
    rms_norm_forward,
    rms_norm_reference,
    sum_row,
)

EPS = 1e-5
HIDDEN = (1, 3, 64, 100, 576)


def tensors(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * 3
    return x.to(dtype), (torch.rand(shape[-1], generator=generator) + 0.5).to(dtype)


def exact(x: Tensor, weight: Tensor | None, offset: float = 0.0) -> Tensor:
    x = x.double()
    y = x / ((x * x).sum(-1, keepdim=True) / x.shape[-1] + EPS).sqrt()
    return y if weight is None else y * (weight.double() + offset)


@triton.jit
def _sum_kernel(out_ptr, x_ptr, R: tl.constexpr, LEVELS: tl.constexpr):
    rows = tl.arange(0, R)
    columns = tl.arange(0, 1 << LEVELS)
    x_RD = tl.load(x_ptr + rows[:, None] * (1 << LEVELS) + columns[None, :])
    tl.store(out_ptr + rows, sum_row(x_RD))


@pytest.mark.parametrize("levels", [0, 1, 5, 8, 9, 11])
def test_sum_row_is_the_documented_tree(levels):
    x, _ = tensors(2, 1 << levels)
    out = torch.empty(2)
    _sum_kernel[(1,)](out, x, 2, levels)
    expected = x
    while expected.shape[1] > 1:
        expected = expected[:, 0::2] + expected[:, 1::2]
    assert torch.equal(out, expected[:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("D", HIDDEN)
def test_forward_matches_float64(D, dtype):
    x, weight = tensors(5, D, dtype=dtype)
    # Unit roundoff times the roundings: two (llama), one more for an offset's sum, three in "none".
    # The interpreter truncates to bf16 instead of rounding, which doubles it there.
    unit = torch.finfo(dtype).eps / (1 if dtype == torch.bfloat16 else 2)
    for mode in CASTING_MODES:
        for w, offset in ((weight, 0.0), (None, 0.0), (weight, 1.0)):
            results = []
            for row_mode in ("row", "block"):
                for inference in (False, True):
                    y, rstd = rms_norm_forward(
                        x, w, EPS, offset=offset, casting_mode=mode,
                        inference_mode=inference, row_mode=row_mode,
                    )  # fmt: skip
                    assert rstd.numel() == (0 if inference else 5)
                    results.append(y)
                    if not inference:
                        expected = (x.double().square().mean(-1) + EPS).rsqrt()
                        torch.testing.assert_close(rstd.double(), expected, rtol=2**-19, atol=0)
            expected = exact(x, w, offset)
            bound = expected.abs() * ((1 + unit) ** 4 - 1 + 2**-19) + 2**-24
            assert ((results[0].double() - expected).abs() <= bound).all()
            assert all(torch.equal(results[0], other) for other in results[1:])


def test_strides_and_leading_shapes():
    wide, weight = tensors(2, 3, 80)
    weight = weight[:64].contiguous()
    y, rstd = rms_norm_forward(wide[..., 8:72], weight, EPS)
    assert y.shape == (2, 3, 64)
    assert rstd.shape == (6,)
    torch.testing.assert_close(y.double(), exact(wide[..., 8:72], weight), rtol=2**-19, atol=1e-7)
    assert rms_norm_forward(wide[:0, :, :64], weight, EPS)[0].shape == (0, 3, 64)


@pytest.mark.parametrize("D", HIDDEN)
def test_backward_matches_autograd_in_float64(D):
    x, weight = tensors(5, D)
    dy, _ = tensors(5, D, seed=1)
    for w, offset in ((weight, 0.0), (weight, 1.0), (None, 0.0)):
        leaves = [t if t is None else t.double().requires_grad_() for t in (x, w)]
        rms_norm_reference(*leaves, EPS, offset=offset).backward(dy.double())
        _, rstd = rms_norm_forward(x, w, EPS, offset=offset)
        dx, dweight = rms_norm_backward(dy, x, w, rstd, offset=offset)
        # fp32 throughout: dx is a difference of terms of size |dy| · (w + offset) · rstd ≤ 100.
        torch.testing.assert_close(dx.double(), leaves[0].grad, rtol=1e-5, atol=1e-5)
        if w is None:
            assert dweight is None
        else:
            torch.testing.assert_close(dweight.double(), leaves[1].grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])  # True: x has no view of two dimensions
def test_training_mode_takes_any_leading_shape_and_stride(transposed):
    """What `rms_norm` and `residual_rms_norm` do with CUDA tensors when autograd records."""
    (wide, weight), (wide_residual, _) = (tensors(2, 3, 80, seed=seed) for seed in (0, 1))
    options = {"offset": 1.0, "casting_mode": "gemma"}

    def kernels(x, residual, w):
        norm = _RMSNorm.apply(x, w, (EPS, *options.values()))
        return norm, *_ResidualRMSNorm.apply(x, residual, w, EPS, options)

    def definition(x, residual, w):
        norm, both = (rms_norm_reference(z, w, EPS, **options) for z in (x, x + residual))
        return norm, both, x + residual

    results = []
    for function, dtype in ((kernels, torch.float32), (definition, torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in (wide, wide_residual, weight[:64].clone())]
        x, residual = (t[..., 8:72].transpose(0, int(transposed)) for t in leaves[:2])
        outputs = function(x, residual, leaves[2])
        assert all(y.shape == x.shape for y in outputs)
        dys = [tensors(*x.shape, seed=seed)[0].to(dtype) for seed in (2, 3, 4)]
        gradients = torch.autograd.grad(outputs, leaves, dys)
        results.append([t.detach().double() for t in (*outputs, *gradients)])
    for actual, expected in zip(*results, strict=True):
        # Sums of few fp32 terms: |dy| · (w + offset) · rstd is at most 100.
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_residual_has_the_bits_of_add_then_norm():
    for dtype in (torch.float32, torch.float16):
        x, weight = tensors(5, 100, dtype=dtype)
        residual, _ = tensors(5, 100, dtype=dtype, seed=1)
        y, summed, rstd = residual_rms_norm_forward(x, residual, weight, EPS)
        assert torch.equal(summed, x + residual)
        apart = rms_norm_forward(x + residual, weight, EPS)
        assert torch.equal(y, apart[0])
        assert torch.equal(rstd, apart[1])
        inference = residual_rms_norm_forward(x, residual, weight, EPS, inference_mode=True)
        assert inference[2].numel() == 0
        assert torch.equal(inference[0], y)
