"""Speculation changes nothing: tokens, text, cache and endings equal plain decoding's.

Most tests run on FakeModel, which is exact and asserts its cache; the last part on real
Transformers of random weights.
"""

import logging

import pytest
import torch
from fake_model import FakeModel, ScriptedDrafter, fake_tokenizer

from draftnorm.decoding.drafters import NgramDrafter
from draftnorm.decoding.generation import generate
from draftnorm.decoding.sampling import SamplingConfig
from draftnorm.decoding.speculation import speculate
from draftnorm.decoding.transcript import Transcript
from draftnorm.model.config import ModelConfig
from draftnorm.model.transformer import Transformer

V = 13
GREEDY = SamplingConfig()
SAMPLED = SamplingConfig(temperature=0.9, top_k=9, top_p=0.95, min_p=0.01, seed=11)
PROMPTS = [[1, 2, 3, 1, 2], [7], [0, 1] * 6]


def draft_of(kind: str, target, plain: list[int]):
    """A drafter of each quality. `plain` is prompt and output of plain decoding."""
    size = target.config.vocab_size
    if kind == "good":  # right except for every fifth token
        return ScriptedDrafter(
            lambda tokens, n: [
                (token + (i % 5 == 4)) % size
                for i, token in enumerate(plain[len(tokens) : len(tokens) + n], len(tokens))
            ]
        )
    if kind == "random":
        return FakeModel(size, seed=99)
    if kind == "wrong":
        return ScriptedDrafter(
            lambda tokens, n: [(t + 1) % size for t in plain[len(tokens) : len(tokens) + n]]
        )
    if kind == "self":
        return target
    return NgramDrafter(shortest=1)


def outputs(model, prompt, **options):
    return list(generate(model, None, prompt, ignore_eos=True, **options).result().token_ids)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", ["good", "random", "wrong", "self", "ngram"])
def test_tokens_equal_plain_decoding(kind: str, sampling: SamplingConfig) -> None:
    target = FakeModel(V)
    for prompt in PROMPTS:
        expected = outputs(target, prompt, sampling=sampling, max_new_tokens=40)
        # A right or wrong guess needs to know what comes, also past the budget.
        longer = outputs(target, prompt, sampling=sampling, max_new_tokens=60)
        for draft_length in [*range(1, 9), 15, "auto"]:
            result = speculate(
                target,
                None,
                prompt,
                draft=draft_of(kind, target, prompt + longer),
                draft_length=draft_length,
                sampling=sampling,
                max_new_tokens=40,
            ).result()
            assert list(result.token_ids) == expected
            assert result.stop_reason == "length"
            statistics = result.speculation
            if kind == "self" and draft_length != "auto":
                assert statistics.acceptance_rate == 1
            if kind == "wrong":
                assert statistics.accepted == 0


def test_plain_decoding_equals_the_naive_loop() -> None:
    """Greedy against argmax over the whole context, with no cache and none of our loop."""
    model = FakeModel(V, seed=4)
    tokens = [3, 1]
    for _ in range(20):
        tokens.append(int(model.random_logits(tuple(tokens[-2:]), len(tokens)).argmax()))
    assert outputs(model, tokens[:2], max_new_tokens=20) == tokens[2:]


def test_rejection_at_temperature_0_is_greedy() -> None:
    target = FakeModel(V)
    result = speculate(
        target, None, [1, 2], draft=FakeModel(V, seed=5), acceptance="rejection", max_new_tokens=30
    ).result()
    assert list(result.token_ids) == outputs(target, [1, 2], max_new_tokens=30)


@pytest.mark.parametrize("acceptance", ["exact", "rejection"])
def test_the_target_as_its_own_draft_is_always_accepted(acceptance: str) -> None:
    """With p = q the rejection rule never rejects, in exact mode both win the same race."""
    target = FakeModel(V)
    sampling = SamplingConfig(temperature=1.3, seed=2)
    result = speculate(
        target,
        None,
        [1, 2],
        draft=FakeModel(V),
        draft_length=4,
        acceptance=acceptance,
        sampling=sampling,
        max_new_tokens=101,
    ).result()
    assert result.speculation.acceptance_rate == 1
    assert result.speculation.tokens_per_cycle == 5


def test_request_id_and_seed_give_other_samples() -> None:
    model = FakeModel(V)
    base = outputs(model, [1], sampling=SAMPLED)
    assert base == outputs(model, [1], sampling=SAMPLED)
    assert base != outputs(model, [1], sampling=SAMPLED, request_id=1)
    assert base != outputs(model, [1], sampling=SamplingConfig(temperature=0.9, seed=12))


@pytest.mark.parametrize("budget", range(21))
@pytest.mark.parametrize("draft_length", [1, 3, 15])
def test_budget_is_exact(budget: int, draft_length: int) -> None:
    target = FakeModel(V)
    result = speculate(
        target, None, [1, 2], draft=target, draft_length=draft_length, max_new_tokens=budget
    ).result()
    assert list(result.token_ids) == outputs(target, [1, 2], max_new_tokens=budget)
    assert len(result.token_ids) == budget
    assert result.stop_reason == "length"
    assert result.speculation.discarded == 0


@pytest.mark.parametrize("place", range(12))
@pytest.mark.parametrize("kind", ["self", "wrong", "good"])
def test_a_stop_token_ends_the_output_anywhere_in_a_block(place: int, kind: str) -> None:
    """The stop id is set to be what plain decoding says at `place`; blocks have six tokens."""
    prompt = [1, 2, 3]
    target = FakeModel(997, seed=8)
    plain = outputs(target, prompt, max_new_tokens=40)
    assert len(set(plain[:13])) == 13  # so that the stop id occurs once
    stopping = FakeModel(997, seed=8, eos_token_ids=(plain[place],))
    generation = speculate(
        stopping, None, prompt, draft=draft_of(kind, target, prompt + plain), draft_length=5
    )
    result = generation.result()
    assert list(result.token_ids) == plain[: place + 1]
    assert result.stop_reason == "stop_token"
    statistics = result.speculation
    assert statistics.cycles + statistics.accepted - statistics.discarded == place
    assert generation.decoder.cache.lengths[0] == len(prompt) + place


def test_statistics_add_up() -> None:
    target = FakeModel(V)
    plain = outputs(target, [1, 2], max_new_tokens=80)
    draft = draft_of("good", target, [1, 2, *plain])
    result = speculate(target, None, [1, 2], draft=draft, draft_length=3, max_new_tokens=60)
    statistics = result.result().speculation
    assert 1 + statistics.cycles + statistics.accepted == 60
    assert statistics.tokens_per_cycle == pytest.approx(59 / statistics.cycles)
    assert statistics.acceptance_rate == pytest.approx(statistics.accepted / statistics.drafted)
    assert statistics.experts_per_layer is None


def test_chunks_make_up_the_result_and_tell_drafts_apart() -> None:
    pieces = [f" {chr(97 + i)}" for i in range(V)]
    target, tokenizer = FakeModel(V), fake_tokenizer(pieces)
    generation = speculate(
        target, tokenizer, [1, 2], draft=target, draft_length=3, max_new_tokens=17
    )
    chunks = list(generation)
    result = generation.result()
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert sum((chunk.token_ids for chunk in chunks), ()) == result.token_ids
    assert result.text == tokenizer.decode(result.token_ids)
    assert [(len(chunk.token_ids), chunk.drafted) for chunk in chunks] == [
        (1, False),
        *[(3, True), (1, False)] * 4,
    ]


@pytest.mark.parametrize("context", [6, 7, 9, 20])
def test_the_context_ends_the_output(context: int) -> None:
    target = FakeModel(V, context=64)
    options = dict(context=context, max_new_tokens=50)
    plain = generate(target, None, [1, 2, 3, 4, 5, 6], **options).result()
    fast = speculate(
        target, None, [1, 2, 3, 4, 5, 6], draft=target, draft_length=15, **options
    ).result()
    assert len(plain.token_ids) == context - 6
    assert plain.token_ids == fast.token_ids
    assert plain.stop_reason == fast.stop_reason == "context"


def test_a_draft_with_a_shorter_context_falls_silent() -> None:
    """Speculation ends where the draft's context does; decoding goes on. Also from the start."""
    target, draft = FakeModel(V), FakeModel(V, context=20)
    for prompt in ([1, 2], [1, 2] * 12):
        result = speculate(
            target, None, prompt, draft=draft, draft_length=4, max_new_tokens=50
        ).result()
        assert list(result.token_ids) == outputs(target, prompt, max_new_tokens=50)
        assert (result.speculation.drafted > 0) == (len(prompt) < 20)


def test_padding_is_never_drafted_and_another_size_is_refused() -> None:
    """The draft likes its padding best; only ids that the tokenizer knows may come out of it."""

    def likes_padding(tokens: tuple[int, ...], position: int) -> torch.Tensor:
        return torch.cat([target.random_logits(tokens, position), torch.full((3,), 50.0)])

    target = FakeModel(V)
    tokenizer = fake_tokenizer([chr(97 + i) for i in range(V)])
    result = speculate(
        target, tokenizer, "abc", draft=FakeModel(V + 3, likes_padding), max_new_tokens=20
    ).result()
    assert result.speculation.acceptance_rate == 1  # otherwise the draft is the target
    assert list(result.token_ids) == outputs(target, [0, 1, 2], max_new_tokens=20)
    with pytest.raises(ValueError, match="another vocabulary"):
        speculate(target, None, [1], draft=FakeModel(V + 3))
    with pytest.raises(ValueError, match="another vocabulary"):
        speculate(target, tokenizer, "abc", draft=FakeModel(V - 1))


def test_invalid_requests() -> None:
    target = FakeModel(V, context=16)
    for options, message in [
        (dict(draft_length=0), "draft_length"),
        (dict(draft_length=16), "draft_length"),
        (dict(draft_length="fast"), "draft_length"),
        (dict(acceptance="typical"), "acceptance"),
        (dict(draft=3), "draft must be"),
        (dict(max_new_tokens=-1), "max_new_tokens"),
        (dict(context=17), "context"),
        (dict(stop=["x"]), "tokenizer"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            speculate(target, None, [1], **options)
        assert "\n" not in str(error.value)


def test_drafters_are_not_trusted() -> None:
    target = FakeModel(V)
    for guess in ([V], [-1], [1] * 9):
        generation = speculate(
            target, None, [1], draft=ScriptedDrafter(lambda *_, g=guess: g), draft_length=8
        )
        with pytest.raises(ValueError, match="the drafter proposed"):
            generation.result()

    class NeedsFeatures(ScriptedDrafter):
        needs_features = True

    with pytest.raises(ValueError, match="hidden states"):
        speculate(target, None, [1], draft=NeedsFeatures(lambda *_: []))


def test_a_useless_drafter_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    target = FakeModel(V)
    plain = outputs(target, [1], max_new_tokens=120)
    draft = draft_of("wrong", target, [1, *plain])
    with caplog.at_level(logging.WARNING, logger="draftnorm"):
        speculate(target, None, [1], draft=draft, draft_length=2, max_new_tokens=100).result()
    assert len(caplog.records) == 1 and "0 of 64 cycles" in caplog.text


# --- real Transformers ---


def transformer(seed: int, **overrides) -> Transformer:
    fields = dict(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_size=8,
        tie_embeddings=True,
        context=512,
        windows=(None,) * 2,
        initializer_range=0.3,
    )
    return Transformer(ModelConfig(**fields | overrides)).init_weights(seed)


@pytest.fixture(scope="module")
def target() -> Transformer:
    return transformer(0)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", ["self", "random", "ngram"])
def test_transformer_tokens_equal_plain_decoding(target, kind: str, sampling) -> None:
    draft = {"self": target, "random": transformer(1), "ngram": "ngram"}[kind]
    for prompt in PROMPTS:
        expected = outputs(target, prompt, sampling=sampling, max_new_tokens=24)
        for draft_length in [*range(1, 9), "auto"]:
            result = speculate(
                target,
                None,
                prompt,
                draft=draft,
                draft_length=draft_length,
                sampling=sampling,
                max_new_tokens=24,
            ).result()
            assert list(result.token_ids) == expected


@pytest.mark.parametrize("kind", ["good", "random"])
def test_sliding_windows_survive_rollback(kind: str) -> None:
    """Accepted and rejected blocks around every border of a window of five."""
    target = transformer(3, windows=(5, None))
    prompt = [1, 2, 3]
    plain = outputs(target, prompt, max_new_tokens=60)
    draft = transformer(1) if kind == "random" else draft_of(kind, target, prompt + plain)
    for draft_length in (1, 4, 7):
        result = speculate(
            target, None, prompt, draft=draft, draft_length=draft_length, max_new_tokens=40
        ).result()
        assert list(result.token_ids) == plain[:40]


@pytest.mark.parametrize("kind", ["good", "self"])
def test_cache_equals_plain_decoding_after_100_cycles(target, kind: str) -> None:
    """Position by position and bit by bit; with accepted and rejected drafts, all positions."""
    prompt, length = [1, 2, 3], 3
    plain = generate(target, None, prompt, max_new_tokens=420)
    expected = list(plain.result().token_ids)
    draft = draft_of(kind, target, prompt + expected)
    fast = speculate(target, None, prompt, draft=draft, draft_length=length, max_new_tokens=410)
    result = fast.result()
    assert list(result.token_ids) == expected[:410]
    assert result.speculation.cycles >= 100
    filled = fast.decoder.cache.lengths[0]
    assert filled == len(prompt) + 409
    for ours, theirs in zip(
        fast.decoder.cache.keys + fast.decoder.cache.values,
        plain.decoder.cache.keys + plain.decoder.cache.values,
        strict=True,
    ):
        assert torch.equal(ours[:, :, :filled], theirs[:, :, :filled])


def test_experts_are_counted_for_a_mixture() -> None:
    sparse = dict(architecture="mixtral", num_experts=4, experts_per_token=2, expert_size=16)
    mixture, its_copy = (transformer(2, **sparse) for _ in range(2))
    options = dict(draft_length=3, max_new_tokens=20)
    result = speculate(mixture, None, [1, 2], draft=mixture, **options).result()
    assert 2 <= result.speculation.experts_per_layer <= 4
    assert list(result.token_ids) == outputs(mixture, [1, 2], max_new_tokens=20)
    # What a model touches as a draft is not the target's.
    apart = speculate(mixture, None, [1, 2], draft=its_copy, **options).result()
    assert result.speculation.experts_per_layer == apart.speculation.experts_per_layer


@pytest.mark.parametrize("draft_length", [2, "auto"])
def test_a_cycle_has_neither_the_time_of_its_commit_nor_the_callers(
    draft_length: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def spend(seconds: float) -> None:
        now[0] += seconds

    commit = Transcript.commit

    def slow_commit(transcript: Transcript, block: list[int]) -> list:
        spend(0.5)
        return commit(transcript, block)

    monkeypatch.setattr(Transcript, "commit", slow_commit)
    target = FakeModel(V, on_pass=lambda rows: spend(2.0))
    draft = ScriptedDrafter(lambda tokens, n: [0] * n)
    options = dict(draft_length=draft_length, max_new_tokens=40, clock=lambda: now[0])
    generation = speculate(target, None, [1, 2], draft=draft, **options)
    for index, _ in enumerate(generation):
        spend(1000.0 if index == 5 else 5.0)  # a slow reader, and once a long pause
    cycles, result = generation.decoder._cycles, generation.result()
    assert {cycle.seconds for cycle in cycles} == {2.0}
    assert result.seconds == 2.5 * len(cycles)  # which has the commits
    assert result.speculation.verify_seconds == 2.0 * len(cycles)
    assert result.speculation.draft_seconds == 0.0
