"""Warps against transformers' own, choices against exact probabilities, and what is refused."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from draftnorm.decoding.noise import EXACT, GUMBEL_RANGE, RESIDUAL
from draftnorm.decoding.sampling import Sampler, SamplingConfig, warp

CONFIGS = [
    dict(temperature=t, top_k=k, top_p=p, min_p=m)
    for t in (0.3, 1.0, 1.7)
    for k in (0, 1, 5, 1000)
    for p in (1e-6, 0.5, 0.9, 1.0)
    for m in (0.0, 0.1, 1.0)
]


def theirs(logits_V: torch.Tensor, temperature, top_k, top_p, min_p) -> torch.Tensor:
    """As `_get_logits_processor` of transformers 5 chains them."""
    scores = TemperatureLogitsWarper(temperature)(None, logits_V[None])
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    return scores[0]


def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    smooth = torch.randn(100, generator=generator) * 4
    ties = torch.randint(0, 4, (100,), generator=generator).float()
    quarters = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()  # cumulative sums land on an edge
    return [smooth, ties, torch.zeros(40), quarters, torch.tensor([3.0])]


@pytest.mark.parametrize("config", CONFIGS)
def test_warps_equal_transformers(config: dict) -> None:
    for row in rows():
        ours, reference = warp(row, SamplingConfig(**config)), theirs(row, **config)
        # As multisets: where top-p cuts through a tie, transformers' sort keeps any of the equals.
        assert torch.equal(ours.sort().values, reference.sort().values)
        if len(row.unique()) == len(row):
            assert torch.equal(ours, reference)
        else:
            for value in row.unique():  # ours keeps the lowest ids
                kept = torch.isfinite(ours[row == value])
                assert torch.equal(kept, kept.sort(descending=True).values)
        assert torch.isfinite(ours).any()


def test_warps_upcast_half_precision() -> None:
    row = (torch.randn(50, generator=torch.Generator().manual_seed(1)) * 3).bfloat16()
    config = SamplingConfig(temperature=0.7, top_p=0.8)
    assert torch.equal(warp(row, config), warp(row.float(), config))


def test_greedy_ties_go_to_the_lowest_id() -> None:
    row = torch.tensor([1.0, 5.0, 5.0, 2.0, 5.0])
    assert Sampler(SamplingConfig()).sample(row, 0) == 1


def test_samples_follow_the_warped_distribution() -> None:
    """χ² of 4,000 positions against softmax; 0.1 % of correct samplers would fail, seed fixed."""
    row = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5, -3.0])
    config = SamplingConfig(temperature=0.8, top_p=0.95, seed=3)
    sampler = Sampler(config)
    counts = np.bincount([sampler.sample(row, i) for i in range(4000)], minlength=6)
    expected = warp(row, config).softmax(-1).double().numpy() * 4000
    assert counts[expected == 0].sum() == 0
    assert chisquare(counts[expected > 0], expected[expected > 0], sum_check=False).pvalue > 1e-3


def test_a_sample_is_argmax_of_logits_plus_noise() -> None:
    row = torch.tensor([0.3, 0.1, -0.2, 0.9])
    sampler = Sampler(SamplingConfig(temperature=1.0, seed=9), request_id=4)
    noise = sampler.noise.gumbel(11, np.arange(4), EXACT)
    assert sampler.sample(row, 11) == int(np.argmax(row.numpy() + noise))


@pytest.mark.parametrize("spread", [0.1, 5.0, 12.0, 100.0])
def test_a_race_without_the_hopeless_is_the_whole_race(spread: float) -> None:
    sampler = Sampler(SamplingConfig(temperature=1.0, seed=3))
    rows_MV = torch.randn(200, 300, generator=torch.Generator().manual_seed(1)) * spread
    for position, row_V in enumerate(rows_MV):
        noise = sampler.noise.gumbel(position, np.arange(300), EXACT)
        whole = int((row_V + torch.from_numpy(noise)).argmax())
        assert sampler.race(row_V, position, EXACT) == whole


def test_no_noise_is_outside_the_range_that_a_race_counts_on() -> None:
    u = np.float32([0.5, 2**23 - 0.5]) * np.float32(2**-23)  # of all 2²³ the outermost
    least, most = -np.log(-np.log(u))
    assert GUMBEL_RANGE - 0.1 < most - least < GUMBEL_RANGE - 0.01


def test_weight_zero_never_wins() -> None:
    sampler = Sampler(SamplingConfig(temperature=1.0))
    row = torch.tensor([-math.inf, -80.0, -math.inf])
    assert {sampler.race(row, i, RESIDUAL) for i in range(200)} == {1}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_are_reported(temperature: float) -> None:
    row = torch.tensor([0.0, math.nan, 1.0])
    with pytest.raises(ValueError, match="NaN"):
        Sampler(SamplingConfig(temperature=temperature)).sample(row, 0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("row", [[0.0, math.inf, 1.0], [-math.inf] * 3])
def test_logits_without_a_finite_best_are_reported(row: list[float], temperature: float) -> None:
    sampler = Sampler(SamplingConfig(temperature=temperature))
    with pytest.raises(ValueError, match="position 7 hold NaN or infinity"):
        sampler.sample(torch.tensor(row), 7)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(temperature=-0.1),
        dict(temperature=math.nan),
        dict(temperature=math.inf),
        dict(temperature=1e-9),
        dict(top_k=-1),
        dict(top_k=5.0),
        dict(top_k=math.nan),
        dict(top_p=0.0),
        dict(top_p=1.1),
        dict(top_p=math.nan),
        dict(min_p=-0.1),
        dict(min_p=1.1),
        dict(min_p=math.nan),
        dict(seed=-1),
        dict(seed=2**64),
        dict(seed=1.0),
    ],
)
def test_invalid_values(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))) as error:
        SamplingConfig(**wrong)
    assert "\n" not in str(error.value)


def test_whole_numbers_of_numpy_are_whole_numbers() -> None:
    config = SamplingConfig(temperature=1.0, top_k=np.int32(2), seed=np.uint64(2**63 + 1))
    same = SamplingConfig(temperature=1.0, top_k=2, seed=2**63 + 1)
    assert torch.equal(Sampler(config).settings(), Sampler(same).settings())
    row = torch.tensor([0.3, 0.1, -0.2, 0.9])
    assert [Sampler(config).sample(row, i) for i in range(20)] == [
        Sampler(same).sample(row, i) for i in range(20)
    ]
