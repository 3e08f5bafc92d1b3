"""The rejection rule against exact enumeration; its edges; the comparison of two outputs."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from fake_model import FakeModel, ScriptedDrafter
from scipy.stats import chisquare

from draftnorm.decoding.generation import generate
from draftnorm.decoding.noise import ACCEPT, DRAFT, RESIDUAL
from draftnorm.decoding.sampling import Sampler, SamplingConfig, warp
from draftnorm.decoding.speculation import speculate
from draftnorm.decoding.verification import (
    accepts,
    first_difference,
    residual,
    verify_exact,
    verify_rejection,
)

V, LENGTH, RUNS = 5, 3, 2500
PROMPT = [0, 1]


def exact_distribution(model: FakeModel, sampling: SamplingConfig) -> dict[tuple[int, ...], float]:
    """The probability of every output of LENGTH tokens, as a product of softmaxes."""
    distribution = {}
    for output in itertools.product(range(V), repeat=LENGTH):
        tokens, probability = list(PROMPT), 1.0
        for token in output:
            logits = model.random_logits(tuple(tokens[-model.order :]), len(tokens))
            probability *= float(warp(logits, sampling).double().softmax(-1)[token])
            tokens.append(token)
        distribution[output] = probability
    return distribution


def model_draft() -> FakeModel:
    return FakeModel(V, seed=7, sharpness=1.5)


def one_hot_draft() -> ScriptedDrafter:
    return ScriptedDrafter(lambda tokens, n: [(tokens[-1] + i) % V for i in range(n)])


@pytest.mark.parametrize(
    ("acceptance", "draft", "warps"),
    [
        ("rejection", model_draft, {}),
        ("rejection", model_draft, {"top_p": 0.8}),
        ("rejection", model_draft, {"top_k": 3, "min_p": 0.05}),
        ("rejection", one_hot_draft, {}),
        ("rejection", one_hot_draft, {"top_p": 0.8}),
        ("exact", model_draft, {"top_p": 0.8}),
    ],
)
def test_outputs_follow_the_target_exactly(acceptance: str, draft, warps: dict) -> None:
    """χ² over all outputs, one noise key a run. Seeds are fixed, so this passes or fails for good;
    a right implementation fails once in 1,000 choices of them.
    """
    target, drafter = FakeModel(V, sharpness=1.0), draft()
    counts: Counter[tuple[int, ...]] = Counter()
    for run in range(RUNS):
        result = speculate(
            target,
            None,
            PROMPT,
            draft=drafter,
            draft_length=2,
            acceptance=acceptance,
            sampling=SamplingConfig(temperature=0.9, seed=5, **warps),
            request_id=run,
            max_new_tokens=LENGTH,
        ).result()
        counts[result.token_ids] += 1
    expected = exact_distribution(target, SamplingConfig(temperature=0.9, **warps))
    impossible = [output for output, p in expected.items() if p == 0]
    assert not any(counts[output] for output in impossible)
    # Cells with few expected hits are merged, as the χ² approximation wants at least 5 in each.
    common = [output for output, p in expected.items() if p * RUNS >= 5]
    observed = np.array([counts[output] for output in common])
    wanted = np.array([expected[output] * RUNS for output in common])
    rest = max(RUNS - wanted.sum(), 1e-9)
    if rest >= 5:
        observed, wanted = np.append(observed, RUNS - observed.sum()), np.append(wanted, rest)
    assert chisquare(observed, wanted, sum_check=False).pvalue > 1e-3


def test_rejection_accepts_as_often_as_theory_says() -> None:
    """The first draft of a block is accepted with probability Σ min(p, q) (Leviathan et al.)."""
    generator = torch.Generator().manual_seed(0)
    p_logits, q_logits = torch.randn(2, 6, generator=generator)
    q_V = q_logits.softmax(-1)
    accepted = 0
    for run in range(4000):
        sampler = Sampler(SamplingConfig(temperature=1.0, seed=1), request_id=run)
        draft = sampler.race(q_logits, 0, 1)
        block = verify_rejection(torch.stack([p_logits] * 2), [draft], q_V[None], sampler, 0)
        accepted += len(block) == 2
    alpha = float(torch.minimum(p_logits.softmax(-1), q_V).sum())
    # Four standard deviations of a binomial share.
    assert abs(accepted / 4000 - alpha) < 4 * (alpha * (1 - alpha) / 4000) ** 0.5


def test_rejection_uses_its_noise_as_documented() -> None:
    """Against the rule written out in NumPy: which stream decides what, at which position."""
    logits_TV = torch.randn(4, 6, generator=torch.Generator().manual_seed(2)) * 2
    q_logits_NV = torch.randn(3, 6, generator=torch.Generator().manual_seed(3))
    q_NV, p_TV = q_logits_NV.softmax(-1).numpy(), logits_TV.softmax(-1).numpy()
    lengths = Counter()
    for run in range(300):
        sampler = Sampler(SamplingConfig(temperature=1.0, seed=8), request_id=run)
        drafts = [sampler.race(q_logits_NV[i], 20 + i, DRAFT) for i in range(3)]

        def race(weights: np.ndarray, position: int, noise=sampler.noise) -> int:
            u = noise.uniform(position, np.arange(6), RESIDUAL)
            return int(np.argmax(weights / -np.log(u)))  # the exponential race w / e

        expected = []
        for i, d in enumerate(drafts):
            coin = sampler.noise.uniform(20 + i, np.array([d]), ACCEPT)[0]
            if coin * q_NV[i, d] >= p_TV[i, d]:
                expected.append(race(np.maximum(p_TV[i] - q_NV[i], 0), 20 + i))
                break
            expected.append(d)
        else:
            expected.append(race(p_TV[3], 23))
        block = verify_rejection(logits_TV, drafts, torch.from_numpy(q_NV), sampler, 20)
        assert block == expected
        lengths[len(block)] += 1
    assert set(lengths) == {1, 2, 3, 4}


def test_edges_of_the_coin() -> None:
    almost_one = 1 - 2**-24
    assert not accepts(0.0, 0.0, 0.5) and not accepts(0.0, 0.0, 1.0)  # p = 0: never
    assert accepts(0.0, 1e-30, 1.0)  # p > 0 at u = 0: always
    assert accepts(almost_one, 0.3, 0.3)  # p = q: always
    assert accepts(almost_one, 1.0, 0.2)
    assert not accepts(almost_one, 0.2, 0.5)


def test_zero_residual_is_the_target() -> None:
    p_V = torch.tensor([0.5, 0.25, 0.25])
    assert torch.equal(residual(p_V, p_V), p_V)
    assert torch.equal(residual(p_V, torch.tensor([0.75, 0.25, 0.0])), torch.tensor([0, 0, 0.25]))


def test_a_draft_without_probability_is_replaced_by_one_with() -> None:
    logits_TV = torch.tensor([[0.0, 0.0, -torch.inf]] * 2)
    for run in range(50):
        sampler = Sampler(SamplingConfig(temperature=1.0), request_id=run)
        block = verify_rejection(logits_TV, [2], None, sampler, 0)
        assert len(block) == 1 and block[0] in (0, 1)


def test_a_certain_draft_is_accepted_and_its_residual_never_needed() -> None:
    """p and q both one-hot on the draft: p − q = 0, the only case in which nothing is left."""
    logits_TV = torch.tensor([[-torch.inf, 3.0, -torch.inf]] * 2)
    sampler = Sampler(SamplingConfig(temperature=1.0))
    assert verify_rejection(logits_TV, [1], None, sampler, 0) == [1, 1]


def test_exact_stops_at_the_first_difference() -> None:
    logits_TV = torch.eye(5)[[1, 2, 3, 4]]
    sampler = Sampler(SamplingConfig())
    assert verify_exact(sampler.choose(logits_TV, 0), [1, 2, 3]) == [1, 2, 3, 4]
    assert verify_exact(sampler.choose(logits_TV, 0), [1, 0, 3]) == [1, 2]
    assert verify_exact(sampler.choose(logits_TV, 0), [0, 2, 3]) == [1]
    assert verify_exact(sampler.choose(logits_TV[:1], 0), []) == [1]


def test_first_difference_names_place_and_gap() -> None:
    model = FakeModel(9)
    output = list(generate(model, None, [1, 2], max_new_tokens=8).result().token_ids)
    assert first_difference(model, [1, 2], output, output) is None
    other = [*output[:5], (output[5] + 1) % 9, *output[6:]]
    difference = first_difference(model, [1, 2], output, other)
    logits = model.random_logits(tuple([1, 2, *output][5:7]), 7).sort().values
    assert difference.index == 5 and difference.tokens == (output[5], other[5])
    assert difference.top_two_gap == pytest.approx(float(logits[-1] - logits[-2]))
    shorter = first_difference(model, [1, 2], output, output[:3])
    assert (shorter.index, shorter.tokens) == (3, (output[3], None))
