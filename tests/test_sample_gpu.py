"""Sampling on a GPU: the sampler's tokens at real sizes, in graphs, in any company."""

import math

import numpy as np
import pytest
import torch
from sample_support import make_draw
from scipy.stats import chisquare
from torch import Tensor

from draftnorm.decoding.noise import EXACT, Noise
from draftnorm.decoding.sampling import SamplingConfig, warp
from draftnorm.kernels.decode_norm import pdl_options
from draftnorm.kernels.head import NO_TOKEN, choose
from draftnorm.kernels.projection import Workspace, choose_tiling, project
from draftnorm.kernels.sample import SampleWorkspace, pack_settings, sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SETTINGS = [
    dict(temperature=t, top_k=k, top_p=p, min_p=m)
    for t in (0.4, 1.0, 1.9)
    for k in (0, 1, 7, 50, 2000)
    for p in (1.0, 1e-6, 0.5, 0.95)
    for m in (0.0, 0.1, 1.0)
]


def make_rows(M: int, V: int) -> Tensor:
    """Smooth rows, rows of ties and rows with excluded tokens by turns."""
    generator = torch.Generator().manual_seed(0)
    rows_MV = torch.randn(M, V, generator=generator) * 3
    rows_MV[1::3] = rows_MV[1::3].round()
    rows_MV[2::3][torch.rand(rows_MV[2::3].shape, generator=generator) > 0.5] = -math.inf
    return rows_MV


def draw(logits_MV: Tensor, positions_M: Tensor, settings: list[dict], *, pdl=None) -> Tensor:
    M, V = logits_MV.shape
    chosen = torch.full((M,), -7, dtype=torch.int32, device="cuda")
    sample(
        chosen, logits_MV.cuda(), make_draw(positions_M, settings, "cuda"), rows=M,
        workspace=SampleWorkspace.allocate(M, V, chosen.device),
        pdl=pdl or pdl_options(chosen.device),
    )  # fmt: skip
    return chosen.cpu()


@pytest.mark.parametrize(("V", "rows"), [(1000, 9000), (50_257, 180), (128_256, 180)])
def test_every_setting_draws_what_the_sampler_draws(V: int, rows: int) -> None:
    few_MV = make_rows(min(rows, 180), V)
    logits_MV = few_MV.repeat(rows // len(few_MV), 1)
    settings = [SETTINGS[m % len(SETTINGS)] | dict(seed=m << 20) for m in range(rows)]
    positions_M = torch.arange(1, rows + 1) * 77
    tokens = draw(logits_MV, positions_M, settings).tolist()
    warped = [
        warp(row_V, SamplingConfig(**config))
        for row_V, config in zip(few_MV, SETTINGS, strict=False)
    ]
    elsewhere = 0
    for m, token in enumerate(tokens):
        noise_V = Noise(m << 20).gumbel(int(positions_M[m]), np.arange(V), EXACT)
        race_V = warped[m % len(few_MV)] + torch.from_numpy(noise_V)
        # Scores and noise are below 32: four roundings separate what is equal. But the sampler sums
        # probabilities in another order, so that the border of top-p may lie a token elsewhere.
        if race_V[token] < race_V.max() - 2**-18:
            assert SETTINGS[m % len(SETTINGS)]["top_p"] < 1, (m, token)
            elsewhere += 1
    assert elsewhere <= rows // 100


def test_a_row_has_the_same_token_in_any_company() -> None:
    logits_MV, positions_M = make_rows(144, 49_152), torch.arange(5, 149)
    for config in (dict(), dict(top_k=40), dict(top_p=0.9), dict(top_k=40, top_p=0.9, min_p=0.01)):
        settings = [dict(temperature=0.9, seed=4) | config]
        together = draw(logits_MV, positions_M, settings)
        assert torch.equal(draw(logits_MV, positions_M, settings, pdl={"PDL": False}), together)
        for M in (1, 2, 5, 16, 17, 33):
            for first in (0, 7, 144 - M):
                rows = slice(first, first + M)
                some = draw(logits_MV[rows], positions_M[rows], settings)
                assert torch.equal(some, together[rows]), (config, M, first)


def test_draws_follow_the_warped_distribution() -> None:
    """χ² of 40,000 positions against softmax; 0.1 % of correct samplers would fail, seed fixed."""
    row_V, count = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5, -3.0]), 40_000
    for config in (dict(), dict(top_k=4, top_p=0.9), dict(min_p=0.1)):
        config = dict(temperature=0.8, seed=3) | config
        logits_MV = row_V.expand(count, 6).contiguous()
        tokens = draw(logits_MV, torch.arange(1, count + 1), [config])
        counts = np.bincount(tokens, minlength=6)
        expected = warp(row_V, SamplingConfig(**config)).softmax(-1).double().numpy() * count
        assert counts[expected == 0].sum() == 0
        live = expected > 0
        assert chisquare(counts[live], expected[live], sum_check=False).pvalue > 1e-3


def test_a_captured_graph_follows_new_settings_and_marks_nan_and_infinity() -> None:
    M, V = 5, 49_152
    logits_MV, positions_M = make_rows(M, V), torch.arange(30, 30 + M)
    device = torch.device("cuda")
    held = logits_MV.cuda(), make_draw(positions_M, [dict(temperature=1.0)], "cuda")
    chosen = torch.empty(M, dtype=torch.int32, device=device)
    settings_BW = held[1].settings_BW
    workspace = SampleWorkspace.allocate(M, V, device)

    def launch() -> None:
        sample(chosen, *held, workspace=workspace, rows=M, pdl=pdl_options(device))

    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for i, config in enumerate(SETTINGS):
        settings_BW.copy_(pack_settings(**config, seed=i)[None])
        graph.replay()
        expected = draw(logits_MV, positions_M, [dict(**config, seed=i)])
        assert torch.equal(chosen.cpu(), expected), config
    held[0][1, 30_000], held[0][2, 40_000] = math.inf, math.nan
    for i, config in enumerate(SETTINGS):
        settings_BW.copy_(pack_settings(**config, seed=i)[None])
        graph.replay()
        assert (chosen.cpu() == NO_TOKEN).tolist() == [False, True, True, False, False]


@pytest.mark.parametrize(("V", "K"), [(8192, 256), (49_152, 576), (128_256, 2048), (32_000, 4096)])
def test_the_head_draws_what_is_drawn_from_its_logits(V: int, K: int) -> None:
    """Token and score, bit for bit, in any company, and without storing the logits."""
    M, tiling, device = 33, choose_tiling(V, K, "argmax"), torch.device("cuda")
    generator = torch.Generator(device).manual_seed(1)
    x_MK, weight_VK = (
        torch.randn(n, K, generator=generator, device=device).bfloat16() for n in (M, V)
    )
    weight_VK /= K**0.5
    pdl, settings = pdl_options(device), [dict(temperature=0.7, seed=9, stream=1)]
    positions_M, nothing = torch.arange(70, 70 + M), torch.zeros(0, device=device)
    workspace = Workspace(partials=nothing, tickets=nothing.int())

    def head(first: int, rows: int, out: Tensor | None) -> tuple[Tensor, Tensor]:
        best = torch.empty(rows, -(-V // tiling.rows), device=device)
        best = best, best.int()
        chosen = torch.empty(rows, dtype=torch.int32, device=device)
        project(out, x_MK[first : first + rows].clone(), weight_VK, rows=rows, epilogue="argmax",
                workspace=workspace, tiling=tiling, pdl=pdl, best=best,
                draw=make_draw(positions_M[first : first + rows], settings, "cuda"))  # fmt: skip
        choose(chosen, best, rows=rows, pdl=pdl)
        return chosen.cpu(), best[0]

    logits_MV = torch.empty(M, V, device=device)
    chosen_M, best_MC = head(0, M, logits_MV)
    assert torch.equal(chosen_M, draw(logits_MV, positions_M, settings))
    for rows in (1, 2, 5, 8, 9, 16, 17):
        for first in (0, 7, M - rows):
            some_M, some_MC = head(first, rows, None)
            assert torch.equal(some_M, chosen_M[first : first + rows])
            assert torch.equal(some_MC, best_MC[first : first + rows])
