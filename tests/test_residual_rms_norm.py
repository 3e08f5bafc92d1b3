"""Residual add + RMSNorm has the bits of the two operations, and the gradients of float64."""

import pytest
import torch

from draftnorm.kernels.residual_rms_norm import residual_rms_norm, residual_rms_norm_forward
from draftnorm.kernels.rms_norm import rms_norm, rms_norm_reference

EPS = 1e-5
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def tensors(*shape: int, dtype: torch.dtype, device: str = "cpu"):
    generator = torch.Generator().manual_seed(0)
    x, residual, dy, dsummed = torch.randn(4, *shape, generator=generator).to(device, dtype)
    weight = (torch.rand(shape[-1], generator=generator) + 0.5).to(device, dtype)
    return x, residual, weight, dy, dsummed


def check_bits(*shape: int, dtype: torch.dtype, device: str) -> None:
    x, residual, weight, *_ = tensors(*shape, dtype=dtype, device=device)
    for w, offset, mode in ((weight, 0.0, "llama"), (None, 0.0, "none"), (weight, 1.0, "gemma")):
        options = {"offset": offset, "casting_mode": mode}
        y, summed = residual_rms_norm(x, residual, w, EPS, **options)
        assert torch.equal(summed, x + residual)
        assert torch.equal(y, rms_norm(x + residual, w, EPS, **options))


def check_gradients(*shape: int, dtype: torch.dtype, device: str) -> None:
    x, residual, weight, dy, dsummed = tensors(*shape, dtype=dtype, device=device)
    leaves = [t.clone().requires_grad_() for t in (x, residual, weight)]
    torch.autograd.backward(residual_rms_norm(*leaves, EPS), (dy, dsummed))
    # The sum as it was rounded: its rounding is part of the input, not of the gradient.
    wide = [(x + residual).double().requires_grad_(), weight.double().requires_grad_()]
    y = rms_norm_reference(*wide, EPS)
    torch.autograd.backward((y, wide[0]), (dy.double(), dsummed.double()))
    # dx is rounded after the norm's backward and again after the sum; CPU autograd in half
    # precision rounds at each of its ~8 operations.
    bound = torch.finfo(dtype).eps / 2 * (2 if device == "cuda" else 8) + 2e-6
    for leaf, expected in zip(leaves, (wide[0], wide[0], wide[1]), strict=True):
        assert leaf.grad.dtype == dtype
        error = (leaf.grad.double() - expected.grad).norm() / expected.grad.norm()
        assert error <= bound


@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu(dtype):
    check_bits(2, 3, 576, dtype=dtype, device="cpu")
    check_bits(7, dtype=dtype, device="cpu")
    check_gradients(2, 3, 100, dtype=dtype, device="cpu")


def test_inference_mode_where_autograd_records_is_an_error():
    x, residual, weight, *_ = tensors(2, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match="autograd records"):
        residual_rms_norm(x.requires_grad_(), residual, weight, EPS, inference_mode=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3,), (1, 576), (2, 3, 100), (5000, 129), (17, 8192)])
def test_gpu(shape, dtype):
    check_bits(*shape, dtype=dtype, device="cuda")
    check_gradients(*shape, dtype=dtype, device="cuda")


@pytest.mark.gpu
def test_gpu_strides_inference_mode_and_errors():
    x, residual, weight, *_ = tensors(4, 160, dtype=torch.bfloat16, device="cuda")
    weight = weight[:128].contiguous()
    parts = (x[:, 8:136], residual[:, :128])
    y, summed, rstd = residual_rms_norm_forward(*parts, weight, EPS, inference_mode=True)
    assert rstd.numel() == 0
    assert torch.equal(summed, parts[0] + parts[1])
    assert torch.equal(y, rms_norm(summed, weight, EPS))
    with pytest.raises(ValueError, match="differ"):
        residual_rms_norm(parts[0], parts[1].float(), weight, EPS)
