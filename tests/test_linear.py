"""The decode tile's product: right, and equal bits for a row wherever it stands in the tile."""

import pytest
import torch

from draftnorm.kernels.linear import row_tile, tile_linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (96, 64), (960, 576)])
def test_tile_linear(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    N, K = shape
    rows = row_tile(torch.device("cpu"), dtype)
    x, weight, bias = torch.randn(rows, K), torch.randn(N, K), torch.randn(N)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    y = tile_linear(x, weight, bias)
    expected = x.double() @ weight.double().T + bias.double()
    # K products of size about 1 summed in fp32, then rounded to the dtype.
    error = K * 2**-24 * 4 + torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=error)
    assert y.is_contiguous()
    for order in (torch.arange(rows).flip(0), torch.zeros(rows, dtype=torch.long)):
        assert torch.equal(tile_linear(x[order], weight, bias), y[order])
