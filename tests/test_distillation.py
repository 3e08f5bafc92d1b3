"""Distillation: samples are the target's, the loss is least there, cycles are counted right."""

from itertools import islice

import numpy as np
import pytest
import torch

from draftnorm.decoding.distillation import (
    TEMPERATURES,
    MixedBlocks,
    continuations,
    distillation_loss,
    draft_config,
    sample_sequences,
)
from draftnorm.decoding.generation import generate
from draftnorm.decoding.speculation import speculate
from draftnorm.model.corpus import TokenBlocks
from draftnorm.model.training import llama_config, mixtral_config
from draftnorm.model.transformer import Transformer

SIZES = dict(num_layers=2, num_heads=4, num_kv_heads=2, head_size=8, hidden_size=32, context=64)
TARGET = mixtral_config(vocab_size=29, num_experts=4, experts_per_token=2, expert_size=24, **SIZES)


def random_model(config, seed: int = 0, scale: float = 4.0) -> Transformer:
    """Weights large enough that the next token depends on the context."""
    model = Transformer(config).init_weights(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= scale
    return model


def test_greedy_rows_are_plain_decoding():
    target = random_model(TARGET)
    prompts_BT = torch.tensor([[1, 5, 9], [1, 7, 2], [3, 3, 3]])
    sampled = sample_sequences(
        target, prompts_BT, 20, torch.tensor([0.0, 0.0, 1.0]), torch.Generator()
    )
    for row in (0, 1):
        plain = generate(
            target, None, prompts_BT[row].tolist(), max_new_tokens=17, ignore_eos=True
        ).result()
        assert sampled[row, 3:].tolist() == list(plain.token_ids)


def test_sampled_tokens_follow_the_tempered_distribution():
    target, B, temperature = random_model(TARGET), 20_000, 0.7
    prompt = torch.tensor([1, 5, 9])
    sampled = sample_sequences(
        target,
        prompt.expand(B, 3),
        4,
        torch.full((B,), temperature),
        torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        expected = (target(prompt[None])[0, -1] / temperature).softmax(-1) * B
    observed = torch.bincount(sampled[:, 3], minlength=29).float()
    large = expected >= 5  # where χ² holds; what is left counts as one cell
    rest = expected[~large].sum(), observed[~large].sum()
    chi_square = ((observed - expected) ** 2 / expected)[large].sum()
    chi_square += (rest[1] - rest[0]) ** 2 / rest[0].clamp(min=1)
    freedom = int(large.sum())
    # Mean `freedom`, variance twice that: five standard deviations, for a fixed seed.
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_continuations_are_half_prompt_and_half_the_targets_own():
    target = random_model(TARGET)
    text = TokenBlocks(np.random.Generator(np.random.Philox(0)).integers(3, 29, 200), 8)
    batches = list(islice(continuations(target, text, batch_size=8), 2))
    starts = {tuple(text[i][1:8].tolist()) for i in range(len(text))}
    for tokens_BS in batches:
        assert tokens_BS.shape == (8, 16)
        assert all(row[0] == 1 and tuple(row[1:8]) in starts for row in tokens_BS.tolist())
    assert not torch.equal(batches[0][:, :8], batches[1][:, :8])  # other prompts in every batch
    greedy = TEMPERATURES.count(0.0)
    for row in batches[0][:greedy].tolist():
        plain = generate(target, None, row[:8], max_new_tokens=8, ignore_eos=True).result()
        assert row[8:] == list(plain.token_ids)


def test_the_loss_is_least_where_the_draft_is_the_target():
    target = random_model(TARGET)
    tokens = torch.randint(0, 29, (2, 9), generator=torch.Generator().manual_seed(0))
    loss_of = distillation_loss(target, first_choice=0.0)
    own, report = loss_of(target, tokens)
    with torch.no_grad():
        p_MV = target(tokens[:, :-1]).flatten(0, 1).softmax(-1)
    entropy = -(p_MV * p_MV.log()).sum(-1).mean()
    torch.testing.assert_close(own, entropy)
    assert report["agreement"] == 1.0
    other, report = loss_of(random_model(TARGET, seed=1), tokens)
    assert other > own and report["agreement"] < 1.0


def test_the_argmax_term_adds_its_cross_entropy():
    target, draft = random_model(TARGET), random_model(TARGET, seed=1)
    tokens = torch.randint(0, 29, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        choice = target(tokens[:, :-1]).flatten(0, 1).argmax(-1)
        hard = torch.nn.functional.cross_entropy(draft(tokens[:, :-1]).flatten(0, 1), choice)
        losses = [distillation_loss(target, first_choice=w)(draft, tokens)[0] for w in (0.0, 0.5)]
    torch.testing.assert_close(losses[1] - losses[0], 0.5 * hard)


def test_no_gradient_reaches_the_target():
    target, draft = random_model(TARGET), random_model(TARGET, seed=1)
    distillation_loss(target)(draft, torch.tensor([[1, 2, 3, 4]]))[0].backward()
    assert all(p.grad is None for p in target.parameters())
    assert all(p.grad is not None for p in draft.parameters())


def simulate_cycles(accepted_BT: torch.Tensor, draft_length: int) -> tuple[float, float]:
    """(Tokens per cycle, acceptance rate) if draft t of a sequence is good where accepted[b, t].

    While drafts are accepted, the draft's context is the target's own text; so the agreement of
    both models on that text, known for every position, tells what every cycle would have accepted.
    """
    tokens = cycles = 0
    for row in accepted_BT.tolist():
        at = 0
        while at + draft_length < len(row):  # a cycle cut by the end would look like a rejection
            run = next((i for i in range(draft_length) if not row[at + i]), draft_length)
            at, tokens, cycles = at + run + 1, tokens + run + 1, cycles + 1
    if cycles == 0:
        raise ValueError(f"no whole cycle of {draft_length=} fits in {tuple(accepted_BT.shape)}")
    return tokens / cycles, (tokens / cycles - 1) / draft_length


@pytest.mark.parametrize(
    ("accepted", "tokens_per_cycle"),
    [
        ([1, 1, 1, 1, 1, 1], 3.0),  # 0 1 | own, then a cycle that the end would cut
        ([0, 0, 0, 0], 1.0),
        ([1, 0, 0, 1, 1, 1, 1], (2 + 1 + 3) / 3),
    ],
)
def test_cycles_by_hand(accepted, tokens_per_cycle):
    tokens, rate = simulate_cycles(torch.tensor([accepted], dtype=torch.bool), 2)
    assert (tokens, rate) == pytest.approx((tokens_per_cycle, (tokens_per_cycle - 1) / 2))


def test_simulated_cycles_are_those_of_speculation():
    target = random_model(TARGET, scale=3.0)
    draft = random_model(TARGET, scale=3.0)
    with torch.no_grad():  # a draft that agrees now and then
        draft.model.layers[1].self_attn.o_proj.weight *= -0.5
    prompt = [1, 5, 9]
    options = dict(max_new_tokens=50, ignore_eos=True)
    result = speculate(target, None, prompt, draft=draft, draft_length=3, **options).result()
    sequence = torch.tensor([prompt + list(result.token_ids)])
    with torch.no_grad():
        choice = draft(sequence)[:, :-1].argmax(-1)
    # The first new token is the prefill's own.
    accepted = (choice == sequence[:, 1:])[:, len(prompt) :]
    assert 0.2 < accepted.float().mean() < 0.95, "neither useless nor perfect, or nothing is tested"
    statistics = result.speculation
    whole = statistics.cycles - 1  # the budget may cut the last
    tokens, _ = simulate_cycles(accepted, 3)
    assert abs(tokens - statistics.tokens_per_cycle) < 4 / whole


def test_the_draft_has_the_targets_vocabulary_and_context():
    config = draft_config(TARGET, num_layers=1, hidden_size=128)
    assert (config.vocab_size, config.context) == (TARGET.vocab_size, TARGET.context)
    assert config.architecture == "llama" and config.num_heads * config.head_size == 128
    with pytest.raises(ValueError, match="multiple of 64"):
        draft_config(TARGET, num_layers=1, hidden_size=100)


def test_mixed_batches_take_equal_shares():
    class Constant:
        def __init__(self, value: int) -> None:
            self.value = value

        def batch(self, step: int, batch_size: int, *, seed: int) -> torch.Tensor:
            return torch.full((batch_size, 2), self.value)

    mixed = MixedBlocks((Constant(1), Constant(2)))
    assert mixed.batch(0, 4, seed=0)[:, 0].tolist() == [1, 1, 2, 2]
    with pytest.raises(ValueError, match="does not divide"):
        mixed.batch(0, 3, seed=0)


def test_layouts_are_those_of_the_pair():
    assert TARGET.architecture == "mixtral" and TARGET.tie_embeddings
    assert llama_config(vocab_size=29, intermediate_size=8, **SIZES).architecture == "llama"
