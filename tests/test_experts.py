"""Expert paths against the einsum over all experts in float64; routing against its definition."""

import pytest
import torch

from draftnorm.kernels.experts import experts_reference, grouped_experts, route, tile_experts

M, D, F, E, A = 12, 16, 24, 6, 3
# fp32 sums over D + F + A = 43 terms of size about 1: 43 · 2⁻²⁴ ≈ 3e-6.
TOLERANCE = dict(rtol=0, atol=1e-5)


@pytest.fixture
def case() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    ids, weights = route(torch.randn(M, E), A, renormalize=True)
    scale = D**-0.5
    return torch.randn(M, D), ids, weights, torch.randn(E, 2 * F, D) * scale, torch.randn(E, D, F)


def reference(case: tuple[torch.Tensor, ...]) -> torch.Tensor:
    x, ids, weights, gate_up, down = case
    return experts_reference(x.double(), ids, weights.double(), gate_up.double(), down.double())


def test_grouped(case: tuple[torch.Tensor, ...]) -> None:
    torch.testing.assert_close(grouped_experts(*case).double(), reference(case), **TOLERANCE)


def test_grouped_with_an_expert_nobody_chose(case: tuple[torch.Tensor, ...]) -> None:
    x, _, weights, gate_up, down = case
    ids = torch.tensor([[0, 5, 2]]).expand(M, A)
    changed = (x, ids, weights, gate_up, down)
    torch.testing.assert_close(grouped_experts(*changed).double(), reference(changed), **TOLERANCE)


def test_grouped_gradients(case: tuple[torch.Tensor, ...]) -> None:
    def gradients(function) -> tuple[torch.Tensor, ...]:
        x, ids, weights, gate_up, down = case
        leaves = [t.double().requires_grad_() for t in (x, weights, gate_up, down)]
        out = function(leaves[0], ids, leaves[1], leaves[2], leaves[3])
        return torch.autograd.grad(out.square().sum(), leaves)

    for actual, expected in zip(
        gradients(grouped_experts), gradients(experts_reference), strict=True
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_tile_and_its_row_invariance(case: tuple[torch.Tensor, ...], rows: int) -> None:
    x, ids, weights, gate_up, down = case
    expected = reference(case)
    full, _ = tile_experts(x[:4], ids[:4], weights[:4], gate_up, down, rows=4)
    # The same rows among other padding, which may hold anything.
    x_padded = torch.cat((x[:rows], torch.randn(4 - rows, D)))
    part, touched = tile_experts(x_padded, ids[:4], weights[:4], gate_up, down, rows=rows)
    torch.testing.assert_close(part[:rows].double(), expected[:rows], **TOLERANCE)
    assert torch.equal(part[:rows], full[:rows])
    assert touched == len(ids[:rows].unique())


@pytest.mark.parametrize("renormalize", [True, False])
def test_route(renormalize: bool) -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, -1.0], [1.0, 1.0, 1.0, 1.0]])
    ids, weights = route(logits, 2, renormalize=renormalize)
    assert ids.tolist() == [[1, 2], [0, 1]]  # ties go to the lowest id
    probabilities = torch.softmax(logits.double(), dim=-1).gather(1, ids)
    if renormalize:
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    torch.testing.assert_close(weights.double(), probabilities, rtol=1e-6, atol=0)
