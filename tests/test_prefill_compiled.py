"""What a prefill chunk's kernels compile to for sm_90, without a GPU."""

import re

import pytest
import torch
from test_decode_compiled import Launch, Recorder

from draftnorm.kernels import gated, rms_norm, rotary

pytestmark = pytest.mark.skipif(rms_norm.INTERPRETED, reason="compiles for a GPU")


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


@pytest.mark.parametrize("heads", [(32, 8, 128), (40, 8, 128), (32, 32, 80)])
def test_one_kernel_for_any_prompt_and_16_bytes_an_access(heads, monkeypatch) -> None:
    launches: list[Launch] = []
    for module, name in ((gated, "_gated_kernel"), (rotary, "_rotate_into_cache_kernel")):
        monkeypatch.setattr(module, name, Recorder(getattr(module, name), launches))
    H, G, K = heads
    for M, start, B, b, S in ((1, 0, 1, 0, 64), (17, 1, 3, 1, 1984), (512, 16, 4, 2, 4096)):
        gated.gated_forward(empty(M, 2 * 14336))
        table = tuple(empty(M, 1, K, dtype=torch.float32) for _ in range(2))
        cache = tuple(empty(B, G, S, K) for _ in range(2))
        q = rotary.rotate_into_cache_forward(empty(M, H + 2 * G, K), table, cache, b, start)
        assert q.shape == (M, H, K)
    assert len(launches) == 6
    assert len(set(launches)) == 2
    for launch in set(launches):
        accesses = re.findall(r"\b(?:ld|st)\.(?!param)\S+", launch.ptx())
        assert len(accesses) >= 3
        assert {access.split(".", 1)[1] for access in accesses} == {"global.v4.b32"}
