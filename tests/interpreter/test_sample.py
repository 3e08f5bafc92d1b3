"""Sampling kernels against decoding.noise and decoding.sampling, which define what they draw."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from decode_support import NO_PDL, needs_run_time_loops, random, workspace
from sample_support import make_draw
from scipy.stats import chisquare
from torch import Tensor

from draftnorm.decoding.noise import DRAFT, EXACT, Noise
from draftnorm.decoding.sampling import Sampler, SamplingConfig, warp
from draftnorm.kernels.cycle import DRAFT_LENGTH, Text
from draftnorm.kernels.head import NO_TOKEN, choose
from draftnorm.kernels.projection import Tiling, project
from draftnorm.kernels.sample import (
    SampleWorkspace,
    is_filtered,
    load_draw,
    noise_bits,
    pack_settings,
    sample,
    sample_reference,
)

SETTINGS = [
    dict(temperature=t, top_k=k, top_p=p, min_p=m)
    for t in (0.4, 1.0, 1.9)
    for k in (0, 1, 3, 7, 20, 1000)  # seven tiles
    for p in (1.0, 1e-6, 0.5, 0.9)
    for m in (0.0, 0.1, 1.0)
]
V = 97


def draw(
    logits_MV: Tensor, positions: list[int], settings: list[dict], *, tile: int = 16, **options
) -> list[int]:
    """Tokens for these positions, row by row; fewer settings than rows are shared by neighbours."""
    M = len(logits_MV)
    chosen = torch.full((M,), -7, dtype=torch.int32)
    options = {
        "workspace": SampleWorkspace.allocate(M, logits_MV.shape[1], "cpu", tile=tile)
    } | options
    sample(
        chosen, logits_MV, make_draw(positions, settings), rows=M, pdl=NO_PDL, **options
    )  # fmt: skip
    return chosen.tolist()


def make_rows(count: int) -> Tensor:
    """Smooth rows, rows of ties and rows with excluded tokens by turns."""
    rows_MV = random(count, V) * 3
    rows_MV[1::3] = rows_MV[1::3].round()
    rows_MV[2::3][random(len(rows_MV[2::3]), V, seed=1) > 0.5] = -math.inf
    return rows_MV


@triton.jit
def _bits_kernel(out_ptr, token_ptr, position_ptr, settings_ptr):
    _, seed, position, stream, request = load_draw(position_ptr, settings_ptr, 0, 1)
    tl.store(out_ptr, noise_bits(tl.load(token_ptr), seed, position, stream, request))


# counter, key, first output word: "philox4x32 10" of Random123's kat_vectors.
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), 0, 0x6627E8D5),
        ((2**32 - 1,) * 4, 2**64 - 1, 0x408F276D),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0_A4093822, 0xD16CFE09),
    ],
)
def test_the_known_answers_of_philox(counter: tuple[int, ...], key: int, answer: int) -> None:
    position, token, stream, request = counter
    settings = pack_settings(temperature=1.0, seed=key, stream=stream, request_id=request)
    out, place, tokens = (
        torch.tensor([word], dtype=torch.int64).to(torch.int32) for word in (0, position - 1, token)
    )
    _bits_kernel[(1,)](out, tokens, place, settings)
    assert int(out) & 0xFFFFFFFF == answer


@needs_run_time_loops
def test_every_setting_draws_what_the_sampler_draws() -> None:
    """Many settings in one call, a row each: nothing about a request is compiled in."""
    some = SETTINGS[::2]
    logits_MV, rng = make_rows(len(some)), np.random.default_rng(0)
    places = [
        dict(seed=int(rng.integers(2**64, dtype=np.uint64)), stream=i % 4, request_id=i << 24)
        for i in range(len(some))
    ]
    positions = rng.integers(1, 2**31, len(some)).tolist()
    settings = [one | place for one, place in zip(some, places, strict=True)]
    tokens = draw(logits_MV, positions, settings)
    for m, (token, place) in enumerate(zip(tokens, places, strict=True)):
        noise_V = Noise(place["seed"], place["request_id"]).gumbel(
            positions[m], np.arange(V), place["stream"]
        )
        race_V = warp(logits_MV[m], SamplingConfig(**some[m])) + torch.from_numpy(noise_V)
        # Scores and noise are below 32, where a rounding is at most 2⁻²⁰. Four make a noisy score
        # (quotient, logarithms, sum): a token behind by them may win, an excluded one may not.
        assert race_V[token] >= race_V.max() - 2**-18, some[m]


def test_the_reference_draws_what_the_sampler_draws() -> None:
    logits_MV = make_rows(20 * len(SETTINGS))
    for m, row_V in enumerate(logits_MV):
        config = SETTINGS[m // 20]
        sampler = Sampler(SamplingConfig(**config, seed=m), request_id=7)
        noise_V = torch.from_numpy(sampler.noise.gumbel(m, np.arange(V), EXACT))
        expected = sampler.sample(row_V, m)
        assert sample_reference(row_V, noise_V, pack_settings(**config)) == expected, config


@needs_run_time_loops
@pytest.mark.parametrize("config", [dict(), dict(top_k=4, top_p=0.9)], ids=["pure", "warped"])
def test_draws_follow_the_warped_distribution(config: dict) -> None:
    """χ² of 200 positions against softmax; 0.1 % of correct samplers would fail, seed fixed."""
    config = dict(temperature=0.8, seed=3) | config
    row_V, count = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5, -3.0]), 200
    tokens = draw(row_V.expand(count, 6).contiguous(), list(range(1, count + 1)), [config], tile=4)
    counts = np.bincount(tokens, minlength=6)
    expected = warp(row_V, SamplingConfig(**config)).softmax(-1).double().numpy() * count
    assert counts[expected == 0].sum() == 0
    live = expected > 0
    assert chisquare(counts[live], expected[live], sum_check=False).pvalue > 1e-3


@needs_run_time_loops
def test_top_p_cuts_through_equals_exactly_at_the_lowest_ids() -> None:
    """Sixteen equal tokens: at 0.5 the ninth has exactly half of the mass ahead of it, and goes."""
    settings = [dict(temperature=1.0, top_p=0.5)]
    tokens = draw(torch.zeros(40, 16), list(range(1, 41)), settings, tile=4)
    assert set(tokens) == set(range(8))


@needs_run_time_loops
def test_a_row_has_the_same_token_and_bits_in_any_company() -> None:
    logits_MV, settings = make_rows(9), dict(temperature=0.9, top_k=5, top_p=0.8, seed=1)
    positions = list(range(40, 49))
    together = SampleWorkspace.allocate(9, V, "cpu", tile=16)
    tokens = draw(logits_MV, positions, [settings], workspace=together)
    for m in range(9):
        alone = SampleWorkspace.allocate(1, V, "cpu", tile=16)
        one = draw(logits_MV[m : m + 1], positions[m : m + 1], [settings], workspace=alone)
        assert one == tokens[m : m + 1]
        assert torch.equal(alone.noisy_MV[0], together.noisy_MV[m])


@needs_run_time_loops
@pytest.mark.parametrize("config", [dict(), dict(top_k=3), dict(top_p=0.5), dict(min_p=0.1)])
def test_no_token_is_marked_and_stays_in_its_row(config: dict) -> None:
    config = dict(temperature=1.0) | config
    logits_MV = make_rows(3)
    expected = draw(logits_MV, [5, 6, 7], [config])
    for nothing, where in ((math.inf, 50), (math.nan, 50), (-math.inf, slice(None))):
        logits_MV[1, where] = nothing
        assert draw(logits_MV, [5, 6, 7], [config]) == [expected[0], NO_TOKEN, expected[2]]
        noise_V, settings_W = torch.zeros(V), pack_settings(**config)
        assert sample_reference(logits_MV[1], noise_V, settings_W) == NO_TOKEN


@needs_run_time_loops
def test_a_drafter_s_step_leaves_its_last_row_s_token_in_the_text() -> None:
    logits_MV = make_rows(2)
    text = Text.allocate(16, torch.device("cpu"))
    text.state[DRAFT_LENGTH] = 4
    settings = [dict(temperature=1.0, stream=DRAFT)]
    _, token = draw(logits_MV, [5, 6], settings, text=text, end="draft")
    assert text.tokens.tolist()[5:8] == [0, token, 0]
    assert text.state[DRAFT_LENGTH] == 6
    logits_MV[1, 0] = math.nan
    assert draw(logits_MV, [7, 8], settings, text=text, end="draft")[1] == NO_TOKEN
    assert text.tokens[8] == 0  # what the next step looks up must exist


def test_a_vocabulary_that_filters_cannot_count_is_an_error() -> None:
    SampleWorkspace.allocate(1, 2**21 - 1, torch.device("meta"))
    with pytest.raises(ValueError, match=r"count to 2,097,151, this vocabulary has 2,097,152"):
        SampleWorkspace.allocate(1, 2**21, torch.device("meta"))


def test_what_excludes_a_token() -> None:
    pure = pack_settings(temperature=0.5, seed=3, stream=1, request_id=2)
    assert not is_filtered(torch.stack([pure, pure]))
    for config in (dict(top_k=1), dict(top_p=0.999), dict(min_p=1e-9)):
        assert is_filtered(torch.stack([pure, pack_settings(temperature=1.0, **config)]))


@needs_run_time_loops
@pytest.mark.parametrize("broken", [None, math.inf, math.nan])
@pytest.mark.parametrize(("rows", "sequences"), [(1, 1), (5, 1), (8, 8), (9, 3), (17, 1)])
@pytest.mark.parametrize("slabs", [1, 2])
def test_the_head_draws_what_is_drawn_from_its_logits(
    slabs: int, rows: int, sequences: int, broken: float | None
) -> None:
    """Token and score, bit for bit, in any company."""
    K = 64
    tiling = Tiling(rows=32, slabs=slabs, early=(K if slabs > 1 else 0, 0), block_k=32)
    x, weight = random(rows, K), random(V, K, seed=1)
    if broken is not None:
        x[:, 7], weight[V - 1, 7] = 1.0, broken
    settings = [dict(temperature=0.5 + b, seed=b) for b in range(sequences)]
    positions = list(range(40, 40 + rows))
    one = make_draw(positions, settings)
    logits, chosen = torch.zeros(rows, V), torch.zeros(rows, dtype=torch.int32)
    best = torch.zeros(rows, 4), torch.zeros(rows, 4, dtype=torch.int32)
    for out in (logits, None):
        project(out, x, weight, rows=rows, epilogue="argmax", workspace=workspace(1, rows, V),
                tiling=tiling, pdl=NO_PDL, best=best, draw=one)  # fmt: skip
        choose(chosen, best, rows=rows, pdl=NO_PDL)
        stored = SampleWorkspace.allocate(rows, V, "cpu", tile=32)
        assert chosen.tolist() == draw(logits, positions, settings, workspace=stored)
        assert all(map(torch.equal, best, stored.best))
    assert ((chosen == NO_TOKEN) == (broken is not None)).all()
