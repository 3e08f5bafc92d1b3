"""The decode path on a GPU: a ladder of row invariance, from one kernel to the tokens.

Against float64 the kernels are tested in Triton's interpreter (tests/interpreter); here only what
needs the machine: equal bits whatever the company, with dependent launch on and off, in a graph.
"""

import pytest
import torch
from steady import plain_tokens
from torch import Tensor

from draftnorm.kernels.decode_attention import (
    AttentionWorkspace,
    count_splits,
    decode_attention,
    workspace_sizes,
)
from draftnorm.kernels.decode_norm import Norm, normalize, pdl_options
from draftnorm.kernels.projection import (
    Rotary,
    Tiling,
    Workspace,
    choose_tiling,
    project,
    projection_reference,
)
from draftnorm.model.cache import KVCache
from draftnorm.model.config import ModelConfig
from draftnorm.model.decode_run import DecodeRun
from draftnorm.model.decode_step import DecodeStep
from draftnorm.model.transformer import Transformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LADDER = [*range(1, 18), 31, 32, 33, 64, 144]
BF16 = torch.bfloat16
SHAPES = {  # N, K, epilogue: one of every kind of tiling
    "small qkv": (960, 576, "plain"),
    "small down": (576, 1536, "residual"),
    "gate up": (16384, 2048, "gated"),
    "down": (4096, 14336, "residual"),
    "router": (8, 4096, "plain"),
    "odd": (1000, 300, "gated"),
}
MODELS = {
    "dense": dict(intermediate_size=384, num_heads=8, num_kv_heads=2, head_size=64),
    "moe": dict(
        architecture="mixtral", intermediate_size=256, num_heads=4, num_kv_heads=2, head_size=64,
        num_experts=8, experts_per_token=2, expert_size=256, windows=(None, 300, None),
    ),
}  # fmt: skip


def random(*shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def projected(x: Tensor, weight: Tensor, epilogue: str, tiling: Tiling, **options) -> Tensor:
    M, N = len(x), len(weight)
    out = torch.full((M, N // 2 if epilogue == "gated" else N), torch.nan, dtype=BF16).cuda()
    padded = -(-M // 16) * 16
    workspace = Workspace(
        partials=torch.full((padded * N,), torch.nan, device="cuda"),
        tickets=torch.zeros(N * padded, dtype=torch.int32, device="cuda"),
    )
    squares = x.float().square()
    squares = torch.nn.functional.pad(squares, (0, -x.shape[1] % 16)).view(M, -1, 16).sum(-1)
    residual = {}
    if epilogue == "residual":
        residual = dict(
            residual_MN=torch.ones_like(out), squares_out=torch.empty(M, -(-N // 16)).cuda()
        )
    options = {"pdl": pdl_options(x.device)} | options
    norm = Norm(weight=torch.ones_like(x[0]), squares=squares.contiguous(), eps=1e-5)
    if not tiling.holds_norm(x.shape[1]):
        normed = torch.full_like(x, torch.nan)
        normalize(normed, x, norm, rows=M, pdl=options["pdl"])
        x, norm = normed, None
    project(out, x, weight, rows=M, epilogue=epilogue, workspace=workspace, tiling=tiling,
            norm=norm, **residual, **options)  # fmt: skip
    return out


@pytest.mark.parametrize("name", SHAPES)
def test_a_row_of_a_projection_has_the_same_bits_in_any_company(name: str) -> None:
    N, K, epilogue = SHAPES[name]
    x, weight = random(144, K), random(N, K, seed=1) * K**-0.5
    tiling = choose_tiling(N, K, epilogue)
    everything = projected(x, weight, epilogue, tiling)
    one = torch.ones(K, dtype=torch.float64, device="cuda")
    ones = torch.ones(144, N, device="cuda") if epilogue == "residual" else None
    expected = projection_reference(
        x.double(), weight.double(), epilogue, norm=(one, 1e-5), residual_MN=ones
    )
    # bf16 rounds the normalised row, the weight's product and the result: 2⁻⁸ each, on sums of
    # size 1; three of them in the worst direction.
    assert (everything - expected).abs().max() <= 3 * 2**-8 * expected.abs().max()
    for M in LADDER:
        for first in {0, 144 - M, min(7, 144 - M)}:  # aligned and misaligned slices
            some = projected(x[first : first + M].clone(), weight, epilogue, tiling)
            assert torch.equal(some, everything[first : first + M]), (M, first)
    without = projected(x[:5].clone(), weight, epilogue, tiling, pdl={"PDL": False})
    assert torch.equal(without, everything[:5])


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("D,K", [(576, 64), (4096, 128)])
def test_a_row_of_rotated_heads_has_the_same_bits_in_any_company(D, K, qk_norm) -> None:
    H, G, M, S = 6, 2, 144, 200
    x, weight = random(M, D), random((H + 2 * G) * K, D, seed=1) * D**-0.5
    angles = random(S, K // 2, seed=2, dtype=torch.float32)
    norms = [random(K, seed=3), random(K, seed=4)] if qk_norm else [None, None]
    tiling = choose_tiling(len(weight), D, "rotary", head_norm=qk_norm)

    def turned(first: int, rows: int) -> Tensor:
        cache = torch.full((2, 1, G, S, K), torch.nan, dtype=BF16, device="cuda")
        positions = torch.arange(first, first + rows, device="cuda", dtype=torch.int32)
        q = torch.full((rows, H, K), torch.nan, dtype=BF16, device="cuda")
        rotary = Rotary(
            cos=angles.cos(), sin=angles.sin(), positions_M=positions, slots_M=positions,
            rows_per_sequence=rows, keys=cache[0], values=cache[1], eps=1e-5,
            q_norm=norms[0], k_norm=norms[1],
        )  # fmt: skip
        workspace = Workspace(
            partials=torch.empty(144 * len(weight), device="cuda"),
            tickets=torch.zeros(144 * len(weight), dtype=torch.int32, device="cuda"),
        )
        project(q, x[first : first + rows].clone(), weight, rows=rows, epilogue="rotary",
                workspace=workspace, tiling=tiling, rotary=rotary,
                pdl=pdl_options(x.device))  # fmt: skip
        kv = cache[:, 0, :, first : first + rows].permute(2, 0, 1, 3).flatten(1, 2)
        return torch.cat([q, kv], dim=1)

    everything = turned(0, M)
    assert not everything.isnan().any()
    for rows in LADDER:
        for first in {0, M - rows, min(7, M - rows)}:
            assert torch.equal(turned(first, rows), everything[first : first + rows])


# Across borders of splits and of their groups: 1,024, 5,120 and 17,408, where splits grow.
@pytest.mark.parametrize("start", [60, 200, 960, 5050, 17340])
@pytest.mark.parametrize("H,G,K,window", [(9, 3, 64, None), (32, 8, 128, None), (8, 2, 64, 700)])
def test_a_row_of_attention_has_the_same_bits_in_any_company(H, G, K, window, start) -> None:
    T, S = 144, start + 220
    keys, values = random(1, G, S, K, seed=1), random(1, G, S, K, seed=2)
    q = random(T, H, K)

    def attend(first: int, rows: int, splits: int) -> Tensor:
        positions = torch.arange(start + first, start + first + rows, device="cuda").int()
        acc, extremes, tickets = workspace_sizes(1, rows, H, G, K, splits)
        workspace = AttentionWorkspace(
            acc=torch.full((acc,), torch.nan, device="cuda"),
            extremes=torch.full((extremes,), torch.nan, device="cuda"),
            tickets=torch.zeros(tickets, dtype=torch.int32, device="cuda"),
        )
        out = torch.full((rows, H, K), torch.nan, dtype=BF16, device="cuda")
        decode_attention(out, q[first : first + rows].clone(), keys, values, positions, rows=rows,
                         splits=splits, workspace=workspace, window=window,
                         pdl=pdl_options(q.device))  # fmt: skip
        return out

    room = count_splits(start + T)
    everything = attend(0, T, room)
    for rows in LADDER:
        for first in {0, T - rows, min(91, T - rows)}:
            for splits in (count_splits(start + first + rows), room, 64):
                assert torch.equal(attend(first, rows, splits), everything[first : first + rows])


def model_and_tokens(name: str) -> tuple[Transformer, Tensor]:
    config = ModelConfig(
        vocab_size=1000, hidden_size=256, num_layers=3, context=2048, initializer_range=0.06,
        **MODELS[name],
    )  # fmt: skip
    model = Transformer(config, device="cuda", dtype=BF16).init_weights(seed=1)
    return model, torch.randint(0, 1000, (800,), generator=torch.Generator().manual_seed(2)).cuda()


@pytest.mark.parametrize("start", [100, 440])  # 256 steps from there cross borders of tiers
@pytest.mark.parametrize("name", MODELS)
def test_verify_rows_are_decode_rows_and_leave_the_same_cache(name: str, start: int) -> None:
    model, tokens = model_and_tokens(name)
    cache = KVCache(model.config, capacity=1024, device="cuda", dtype=BF16)
    model.prefill(tokens[:start], cache)
    end = start + 256
    step = DecodeStep(model, cache, rows=33)
    alone = torch.cat([step.forward(tokens[None, t : t + 1]).clone()[0] for t in range(start, end)])
    layers = [layer[:, :, :end].clone() for layer in cache.keys + cache.values]
    for options in (dict(T=2), dict(T=5), dict(T=8), dict(T=16), dict(T=33), dict(T=5, pdl=False),
                    dict(T=1, norm="inference"), dict(T=3, norm="train")):  # fmt: skip
        cache.rollback(start)
        T = options.pop("T")
        step = DecodeStep(model, cache, rows=33, **options)
        for t in range(start, end + 1 - T, T):
            assert torch.equal(step.forward(tokens[None, t : t + T])[0], alone[t - start :][:T])
        length = cache.lengths[0]
        for ours, expected in zip(cache.keys + cache.values, layers, strict=True):
            assert torch.equal(ours[:, :, :length], expected[:, :, :length])
    with torch.no_grad():
        expected = model.float()(tokens[None, :end])[0, start:]
    # Two roundings to bf16 an operation over three layers: measured 0.6 % on 30 dense layers. Where
    # two experts tie within bf16 the other may be taken, so the bound is for nearly all rows.
    error = (alone - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.quantile(0.9 if name == "moe" else 1.0) < 0.02


@pytest.mark.parametrize("name", MODELS)
def test_greedy_steps_are_forward_steps(name: str) -> None:
    model, tokens = model_and_tokens(name)
    cache = KVCache(model.config, capacity=1024, device="cuda", dtype=BF16)
    model.prefill(tokens[:200], cache)
    step = DecodeStep(model, cache)
    greedy = plain_tokens(step, 7, 400)  # crosses three split borders and a tier
    cache.rollback(200)
    token, expected = torch.tensor([[7]], device="cuda"), []
    for _ in range(400):
        token = step.forward(token).argmax(-1)
        expected.append(int(token))
    assert greedy == expected
    cache.rollback(200)
    first = next(DecodeRun(step).cycles([7], 400))
    assert first.tokens == expected[:1]  # two more are in flight, and nobody's
    assert plain_tokens(step, expected[0], 5) == expected[1:6]


def test_dependent_launch_is_ordered_over_many_replays() -> None:
    model, tokens = model_and_tokens("dense")
    runs = []
    for pdl in (True, False):
        cache = KVCache(model.config, capacity=1024, device="cuda", dtype=BF16)
        model.prefill(tokens[:40], cache)
        step, found = DecodeStep(model, cache, pdl=pdl), []
        for _ in range(10_000 // 500):
            cache.rollback(40)
            found.append(plain_tokens(step, 7, 500))
        assert all(run == found[0] for run in found)
        runs.append(found[0])
    assert runs[0] == runs[1]
