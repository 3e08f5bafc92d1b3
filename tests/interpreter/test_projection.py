"""The projection kernel in Triton's interpreter: every prologue and epilogue against float64."""

import pytest
import torch
from decode_support import NO_PDL, assert_close, needs_run_time_loops, random, workspace
from torch import Tensor

from draftnorm.kernels.decode_experts import route_rows, route_rows_reference
from draftnorm.kernels.decode_norm import Norm, normalize
from draftnorm.kernels.head import NO_TOKEN, choose, choose_reference, embed
from draftnorm.kernels.projection import (
    Experts,
    Rotary,
    Tiling,
    project,
    projection_reference,
)
from draftnorm.kernels.rms_norm import rms_norm_forward
from draftnorm.kernels.rotary import rotary_reference

EPS = 1e-5
TILINGS = {
    "one block": Tiling.whole(108, rows=16, slabs=2),
    "two blocks": Tiling(rows=16, early=(128, 64), slabs=2),
    "block and loop": Tiling(rows=16, early=(64, 0), block_k=32, slabs=2),
    "loop": Tiling(rows=32, block_k=32, slabs=2, stages=2),
    "no slabs": Tiling(rows=16, block_k=16, slabs=1),
}


def squares_of(x_MD: Tensor) -> Tensor:
    """What a producer leaves: sums of squares of aligned blocks of 16 columns."""
    padded = torch.nn.functional.pad(x_MD.float(), (0, -x_MD.shape[1] % 16))
    total = padded.square().view(len(x_MD), -1, 16)
    while total.shape[-1] > 1:  # the tree of rms_norm: neighbours first
        total = total[..., 0::2] + total[..., 1::2]
    return total[..., 0].contiguous()


def run(epilogue: str, M: int, tiling: Tiling, N: int = 40, K: int = 108, normed: bool = True):
    """One projection of random rows -> (result, arguments of the reference, squares left)."""
    x, weight, bias = random(M, K), random(N, K, seed=1) * K**-0.5, random(N, seed=2)
    residual, norm_weight = random(M, N, seed=3), random(K, seed=4)
    out = torch.full((M, N // 2 if epilogue == "gated" else N), torch.nan)
    squares = torch.full((M, -(-N // 16)), torch.nan)
    tiles = -(-N // tiling.rows)
    best = torch.full((M, tiles), torch.nan), torch.full((M, tiles), -1, dtype=torch.int32)
    norm = Norm(weight=norm_weight, squares=squares_of(x), eps=EPS) if normed else None
    source = x
    if normed and not tiling.holds_norm(K):
        source = torch.full_like(x, torch.nan)
        normalize(source, x, norm, rows=M, pdl=NO_PDL)
        norm = None
    project(
        out, source, weight, rows=M, epilogue=epilogue, workspace=workspace(1, M, N),
        tiling=tiling, pdl=NO_PDL, bias_N=bias, norm=norm,
        residual_MN=residual if epilogue == "residual" else None,
        squares_out=squares if epilogue == "residual" else None,
        best=best if epilogue == "argmax" else None,
    )  # fmt: skip
    arguments = [t.double() for t in (x, weight, bias, norm_weight, residual)]
    return out, arguments, squares, best


@needs_run_time_loops
@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("epilogue", ["plain", "residual", "gated", "argmax"])
@pytest.mark.parametrize("normed", [False, True])
def test_matches_float64(epilogue: str, tiling: str, normed: bool) -> None:
    out, (x, weight, bias, norm_weight, residual), squares, best = run(
        epilogue, 3, TILINGS[tiling], normed=normed
    )
    expected = projection_reference(
        x, weight, epilogue, bias_N=bias, norm=(norm_weight, EPS) if normed else None,
        residual_MN=residual if epilogue == "residual" else None,
    )  # fmt: skip
    assert_close(out, expected, 108)
    if epilogue == "residual":
        assert torch.equal(squares, squares_of(out))
    if epilogue == "argmax":
        value, id_ = best
        assert torch.equal(value.amax(dim=1), out.amax(dim=1))
        winner = id_.gather(1, value.argmax(dim=1, keepdim=True))[:, 0]
        assert torch.equal(winner.long(), choose_reference(out))


@needs_run_time_loops
@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("M", [1, 8, 9, 16, 17, 40])
def test_any_number_of_rows(M: int, tiling: str) -> None:
    # Equal bits are tested on the GPU: here a product is NumPy's, whose bits depend on its shape.
    out, (x, weight, bias, norm_weight, _), *_ = run("gated", M, TILINGS[tiling])
    norm = (norm_weight, EPS)
    assert_close(out, projection_reference(x, weight, "gated", bias_N=bias, norm=norm), 108)


@pytest.mark.parametrize("K", [6, 40, 100, 2100])
def test_both_halves_of_the_norm_give_the_bits_of_rms_norm(K: int) -> None:
    M, N = 3, 24
    x, weight, norm_weight = random(M, K), random(N, K, seed=1), random(K, seed=2)
    expected, _ = rms_norm_forward(x, norm_weight, EPS)
    norm = Norm(weight=norm_weight, squares=squares_of(x), eps=EPS)
    by_itself = torch.full_like(x, torch.nan)
    normalize(by_itself, x, norm, rows=M, pdl=NO_PDL)
    assert torch.equal(by_itself, expected)
    tiling = Tiling.whole(K, rows=16, slabs=4)
    fused, apart = torch.empty(M, N), torch.empty(M, N)
    common = dict(rows=M, epilogue="plain", workspace=workspace(1, M, N), tiling=tiling, pdl=NO_PDL)
    project(fused, x, weight, norm=norm, **common)
    project(apart, expected, weight, **common)
    assert torch.equal(fused, apart)


@needs_run_time_loops
@pytest.mark.parametrize("K", [6, 16, 48])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_rotary_turns_heads_and_fills_the_cache(K: int, qk_norm: bool) -> None:
    B, T, H, G, S, D = 2, 3, 4, 2, 20, 24
    x, weight = random(B * T, D), random((H + 2 * G) * K, D, seed=1)
    frequencies = 100.0 ** (-torch.arange(K // 2) / (K // 2))
    angles = torch.arange(S)[:, None] * frequencies
    positions = torch.tensor([4, 5, 6, 11, 12, 13], dtype=torch.int32)
    slots = positions + 1  # anywhere else, as in a tree
    cache = torch.zeros(2, B, G, S, K)
    q, k_norm, q_norm = torch.empty(B * T, H, K), random(K, seed=2), random(K, seed=3)
    rotary = Rotary(
        cos=angles.cos(), sin=angles.sin(), positions_M=positions, slots_M=slots,
        rows_per_sequence=T, keys=cache[0], values=cache[1], eps=EPS,
        q_norm=q_norm if qk_norm else None, k_norm=k_norm if qk_norm else None,
    )  # fmt: skip
    project(
        q, x, weight, rows=B * T, epilogue="rotary", workspace=workspace(1, 1, 1),
        tiling=TILINGS["one block"], pdl=NO_PDL, rotary=rotary,
    )  # fmt: skip
    heads = (x.double() @ weight.double().t()).view(B * T, H + 2 * G, K)
    if qk_norm:
        rstd = torch.rsqrt(heads.square().mean(-1, keepdim=True) + EPS)
        heads[:, :H] *= (rstd * q_norm.double())[:, :H]
        heads[:, H : H + G] *= (rstd * k_norm.double())[:, H : H + G]
    turned = rotary_reference(heads[:, : H + G], positions, frequencies)
    assert_close(q, turned[:, :H], D + 40)
    for m in range(B * T):
        written = cache[:, m // T, :, slots[m]]
        assert_close(written[0], turned[m, H:], D + 40)
        assert_close(written[1], heads[m, H + G :], D + 40)
    assert torch.count_nonzero(cache.abs().sum((2, 4))) == 2 * B * T  # and nothing beside them


@needs_run_time_loops
@pytest.mark.parametrize("renormalize", [False, True])
def test_experts(renormalize: bool) -> None:
    M, E, A, D, F = 18, 5, 2, 20, 12
    x, router, residual = random(M, D), random(M, E, seed=1), random(M, D, seed=2)
    gate_up, down = random(E, 2 * F, D, seed=3), random(E, D, F, seed=4)
    router[:, 3] = -9.0  # an expert that nobody takes
    router[2, :2] = 5.0  # a tie

    def layer(rows: slice) -> Tensor:
        count = len(x[rows])
        chosen, routing = torch.full((1 + E,), -1, dtype=torch.int32), torch.full((E, M), torch.nan)
        route_rows(chosen, routing, router[rows].contiguous(), rows=count, experts=A,
                   renormalize=renormalize, pdl=NO_PDL)  # fmt: skip
        touched, weights = route_rows_reference(router[rows].double(), A, renormalize=renormalize)
        assert chosen[: 1 + len(touched)].tolist() == [len(touched), *touched]
        assert_close(routing[:, :count], weights, E)
        gated, out = torch.full((E * M * F,), torch.nan), torch.empty(count, D)
        common = dict(rows=count, tiling=TILINGS["loop"], pdl=NO_PDL)
        for own, source, into, weight, epilogue in (
            (False, x[rows].contiguous(), gated, gate_up, "gated"),
            (True, gated, out, down, "residual"),
        ):
            last = epilogue == "residual"
            experts = Experts(chosen=chosen, routing_EM=routing, most=E, own_input=own)
            project(into, source, weight, epilogue=epilogue, workspace=workspace(E, count, D),
                    experts=experts, residual_MN=residual[rows].contiguous() if last else None,
                    squares_out=torch.empty(count, 2) if last else None, **common)  # fmt: skip
        return out

    out = layer(slice(0, M))
    _, weights = route_rows_reference(router.double(), A, renormalize=renormalize)
    expected = residual.double()
    for e in range(E):
        y = projection_reference(x.double(), gate_up[e].double(), "gated") @ down[e].double().t()
        expected += weights[e][:, None] * y
    assert_close(out, expected, 8 * (D + F))
    for m in (0, 2, 17):
        assert_close(layer(slice(m, m + 1))[0], expected[m], 8 * (D + F))


@needs_run_time_loops
@pytest.mark.parametrize("tiling", ["one block", "no slabs"])
@pytest.mark.parametrize("broken", ["inf", "nan"])
def test_one_logit_that_is_no_number_leaves_no_token(tiling: str, broken: str) -> None:
    M, N, K = 3, 40, 64
    x, weight = random(M, K), random(N, K, seed=1)
    weight[:, :2] = 0.0
    x[1, :2] = 3e38
    weight[37, 0] = 10.0 if broken == "inf" else torch.nan  # one logit of one row, or of each
    rows = [1] if broken == "inf" else [0, 1, 2]
    tiles = -(-N // TILINGS[tiling].rows)
    best = torch.zeros(M, tiles), torch.zeros(M, tiles, dtype=torch.int32)
    logits = torch.zeros(M, N)
    project(
        logits, x, weight, rows=M, epilogue="argmax", workspace=workspace(1, M, N),
        tiling=TILINGS[tiling], pdl=NO_PDL, best=best,
    )  # fmt: skip
    assert (~logits.isfinite()).nonzero().tolist() == [[row, 37] for row in rows]
    chosen = torch.full((M,), -1, dtype=torch.int32)
    choose(chosen, best, rows=M, pdl=NO_PDL)
    whole = logits.isfinite().all(1)
    assert (chosen[~whole] == NO_TOKEN).all()
    assert torch.equal(chosen[whole].long(), choose_reference(logits[whole]))


def test_embed_and_choose() -> None:
    B, T, D, V = 2, 3, 36, 50
    table, lengths = random(V, D), torch.tensor([7, 0], dtype=torch.int32)
    tokens = torch.tensor([3, 49, 0, 3, 3, 17], dtype=torch.int32)
    x, squares = torch.empty(B * T, D), torch.empty(B * T, 3)
    positions, slots = torch.zeros(2, B * T, dtype=torch.int32)
    embed(x, squares, positions, slots, tokens, lengths, table, rows=B * T,
          rows_per_sequence=T, pdl=NO_PDL)  # fmt: skip
    assert torch.equal(x, table[tokens.long()])
    assert torch.equal(squares, squares_of(x))
    assert positions.tolist() == slots.tolist() == [7, 8, 9, 0, 1, 2]

    value = torch.tensor([[1.0, 4.0, 4.0, 2.0], [-5.0, -7.0, -5.0, -9.0]])
    ids = torch.tensor([[3, 30, 18, 40], [9, 16, 31, 45]], dtype=torch.int32)
    chosen = torch.zeros(2, dtype=torch.int32)
    choose(chosen, (value, ids), rows=2, pdl=NO_PDL)
    assert chosen.tolist() == [18, 9]  # of equals the lowest id
