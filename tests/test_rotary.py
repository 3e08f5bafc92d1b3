"""Rotary embedding against complex arithmetic in float64 and against transformers' frequencies."""

import pytest
import torch

from draftnorm.kernels.rotary import (
    apply_rotary,
    inverse_frequencies,
    rotary_reference,
    rotary_table,
)


@pytest.mark.parametrize("head_size", [2, 8, 64, 128])
@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "dynamic"])
def test_matches_complex_rotation_in_float64(head_size: int, kind: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3, head_size)
    positions = torch.tensor([0, 1, 17, 511, 4095])
    frequencies = inverse_frequencies(head_size, 1e4, kind, factor=4.0)
    y = apply_rotary(x, *rotary_table(positions, frequencies))
    expected = rotary_reference(x, positions, frequencies)
    # An fp32 angle of up to 4095 rad is off by at most 4095 · 2⁻²⁴ = 2.4e-4, and so are its sine
    # and cosine; |x| stays under 5.
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=5 * 2.5e-4)
    torch.testing.assert_close(y[:3].double(), expected[:3], rtol=0, atol=1e-5)


def test_inner_products_depend_on_distance_alone() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 64)
    frequencies = inverse_frequencies(64, 1e4)

    def score(query_position: int, key_position: int) -> float:
        turned = [
            apply_rotary(x, *rotary_table(torch.tensor([p]), frequencies))
            for x, p in ((q, query_position), (k, key_position))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(10, 3) == pytest.approx(score(107, 100), abs=1e-3)
    assert abs(score(10, 3) - score(10, 4)) > 1e-2


def test_half_precision_is_rounded_once() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 16).bfloat16()
    table = rotary_table(torch.tensor([3, 4, 5]), inverse_frequencies(16, 1e4))
    assert torch.equal(apply_rotary(x, *table), apply_rotary(x.float(), *table).bfloat16())


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_frequencies_equal_transformers(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": kind, "factor": 8.0, "rope_theta": 5e5}
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        scaling |= {"original_max_position_embeddings": 8192}
    config = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=2, rope_parameters=scaling
    )
    expected, _ = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    actual = inverse_frequencies(128, 5e5, kind, factor=8.0, original_context=8192)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
