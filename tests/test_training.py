"""Training learns, its pieces are what they say, and a killed run goes on with the same bits."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from draftnorm.model.corpus import TokenBlocks
from draftnorm.model.training import (
    PRESETS,
    MasterAdamW,
    TrainingConfig,
    evaluate,
    next_token_loss,
    router_losses,
    train,
)
from draftnorm.model.transformer import Transformer

SHAPE, TINY = PRESETS["tiny"]
SHORT = replace(TINY, steps=20, batch_size=4, block_size=32, warmup_steps=5, report_every=5)


@pytest.fixture(scope="module")
def blocks(tmp_path_factory) -> TokenBlocks:
    """A language in which each token decides the next: t -> 5 t + 1, with one in ten random."""
    generator = np.random.Generator(np.random.Philox(0))
    tokens = [1]
    for noise in generator.random(20_000):
        follows = (5 * tokens[-1] + 1) % SHAPE.vocab_size
        tokens.append(follows if noise > 0.1 else int(noise * 10 * SHAPE.vocab_size))
    file = tmp_path_factory.mktemp("blocks") / "train.bin"
    np.array(tokens, dtype=np.uint16).tofile(file)
    return TokenBlocks.open(file, SHORT.block_size)


def run(folder: Path, blocks: TokenBlocks, config: TrainingConfig = SHORT, **options):
    model = Transformer(SHAPE).init_weights(0)
    return model, train(model, config, blocks, next_token_loss(config), folder=folder, **options)


def test_a_killed_run_goes_on_with_the_same_bits(tmp_path, blocks):
    def killed(row: dict) -> None:
        if row["step"] == 15:
            raise KeyboardInterrupt

    config = replace(SHORT, checkpoint_every=10)
    whole, history = run(tmp_path / "whole", blocks, config)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", blocks, config, report=killed)
    resumed, resumed_history = run(tmp_path / "killed", blocks, config)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    losses = [[(row["step"], row["loss"]) for row in h] for h in (history, resumed_history)]
    assert losses[0] == losses[1] and [step for step, _ in losses[0]] == [5, 10, 15, 20]


def test_a_checkpoint_of_another_run_is_refused(tmp_path, blocks):
    run(tmp_path, blocks, replace(SHORT, steps=2))
    with pytest.raises(ValueError, match="another run"):
        run(tmp_path, blocks, replace(SHORT, learning_rate=1e-4))


def test_a_loss_that_is_no_number_ends_the_run(tmp_path, blocks):
    with pytest.raises(ValueError, match="train more gently"):
        run(tmp_path, blocks, replace(SHORT, learning_rate=1e30))


def test_training_learns_the_language(tmp_path, blocks):
    config = replace(SHORT, steps=120, batch_size=8, warmup_steps=20, learning_rate=6e-3)
    reports: list[dict] = []
    model, _ = run(tmp_path, blocks, config, report=reports.append)
    assert [row["step"] for row in reports] == list(range(5, 121, 5))
    assert abs(reports[0]["loss"] - math.log(SHAPE.vocab_size)) < 0.7  # begins near uniform
    result = evaluate(model, blocks, max_blocks=32)
    assert result["nats_per_token"] < 3.0  # 1.0 is the language's own entropy, 6.2 is uniform
    shares = torch.tensor(result["routing"])
    assert shares.shape == (SHAPE.num_layers, SHAPE.num_experts)
    torch.testing.assert_close(shares.sum(1), torch.ones(SHAPE.num_layers))
    assert shares.min() > 0.02  # no dead expert


def test_evaluate_is_the_mean_cross_entropy(blocks):
    model = Transformer(SHAPE).init_weights(1)
    tokens = torch.stack([blocks[i] for i in range(5)])
    logits = model(tokens[:, :-1])
    expected = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    result = evaluate(model, blocks, batch_size=2, max_blocks=5)
    # fp32 sums over 160 tokens in another grouping: 1e-5 relative is 100 ulp.
    assert result["nats_per_token"] == pytest.approx(expected, rel=1e-5)
    assert result["tokens"] == 5 * blocks.size


def test_router_losses_of_even_and_collapsed_routing():
    even = torch.stack([torch.eye(4)[i % 4] + torch.eye(4)[(i + 1) % 4] for i in range(8)]) * 9
    balance, _, share = router_losses([even, even], experts_per_token=2)
    assert balance.item() == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(share, torch.full((2, 4), 0.25))
    collapsed = torch.tensor([[30.0, 29.0, 0.0, 0.0]]).repeat(8, 1)
    balance, z_loss, share = router_losses([collapsed], experts_per_token=2)
    # Shares 1/2, 1/2, 0, 0 and probabilities that sum to 1 over the first two: 4 · 1/2 · 1.
    assert balance.item() == pytest.approx(2.0, abs=1e-5)
    assert z_loss.item() == pytest.approx((30 + math.log(1 + math.exp(-1))) ** 2, rel=1e-5)
    assert share.tolist() == [[0.5, 0.5, 0.0, 0.0]]


def test_the_balance_loss_pushes_towards_unused_experts():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(8, 1).requires_grad_()
    router_losses([logits], experts_per_token=1)[0].backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1:] < 0).all()


def test_learning_rate_warms_up_and_falls_along_a_cosine():
    config = TrainingConfig(
        steps=110, batch_size=1, block_size=1, learning_rate=1.0, warmup_steps=10
    )
    assert [config.learning_rate_at(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    middle = 0.02 + 0.98 / 2
    assert config.learning_rate_at(60) == pytest.approx(middle)
    assert config.learning_rate_at(110) == pytest.approx(0.02)


def test_steps_on_fp32_masters_match_adamw_on_an_fp32_model():
    """bf16 parameters are the rounded image of masters that follow torch's own AdamW."""
    config = replace(SHORT, clip_norm=1e9)
    model = Transformer(SHAPE, dtype=torch.bfloat16).init_weights(0)
    optimizer = MasterAdamW(model, config)
    twins = [p.detach().float().requires_grad_() for p in model.parameters()]
    decayed = [t for t in twins if t.dim() > 1]
    others = [t for t in twins if t.dim() == 1]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, 1e-3, betas=config.betas, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for parameter, twin in zip(model.parameters(), twins, strict=True):
            gradient = torch.randn(twin.shape, generator=generator).bfloat16()
            parameter.grad, twin.grad = gradient, gradient.float()
        optimizer.step(1e-3)
        reference.step()
    for parameter, twin in zip(model.parameters(), twins, strict=True):
        assert torch.equal(parameter, twin.bfloat16()) and parameter.grad is None


def test_clipping_bounds_the_gradient(blocks):
    model = Transformer(SHAPE).init_weights(0)
    optimizer = MasterAdamW(model, replace(SHORT, clip_norm=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    norm = optimizer.step(0.0)
    assert norm.item() == pytest.approx(math.sqrt(SHAPE.parameters), rel=1e-4)
    moment = torch.cat([s["exp_avg"].flatten() for s in optimizer.adamw.state.values()])
    # The first moment is (1 - β₁) times the clipped gradient.
    assert moment.norm().item() == pytest.approx(0.1 * 0.5, rel=1e-3)


def test_nonsense_sizes_are_refused():
    with pytest.raises(ValueError, match="steps must be at least 1"):
        replace(SHORT, steps=0)
