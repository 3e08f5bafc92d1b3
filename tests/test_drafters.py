"""Drafters alone: what is looked up, what is fed to a draft model, which vocabularies fit."""

import random

import pytest
from fake_model import FakeModel, config_of, fake_tokenizer

from draftnorm.decoding.drafters import ModelDrafter, NgramDrafter, check_vocabularies
from draftnorm.decoding.sampling import Sampler, SamplingConfig


def slow_lookup(tokens: list[int], length: int, shortest: int, longest: int) -> list[int]:
    """Search backwards for the longest suffix; copy from there, over the end of the text."""
    for n in range(min(longest, len(tokens)), shortest - 1, -1):
        for end in range(len(tokens) - 1, n - 1, -1):
            if tokens[end - n : end] == tokens[-n:]:
                text = list(tokens)
                for i in range(length):
                    text.append(text[end + i])
                return text[len(tokens) :]
    return []


@pytest.mark.parametrize(("shortest", "longest"), [(1, 1), (1, 4), (2, 8), (3, 3)])
def test_ngram_equals_a_search(shortest: int, longest: int) -> None:
    rng = random.Random(0)
    tokens = [rng.randrange(3) for _ in range(5)]
    drafter = NgramDrafter(shortest=shortest, longest=longest)
    drafter.prefill(tokens)
    for _ in range(60):
        length = rng.randint(1, 9)
        expected = slow_lookup(tokens, length, shortest, longest)
        assert drafter.propose(length) == (expected, None)
        new = [rng.randrange(3) for _ in range(rng.randint(1, 4))]
        drafter.catch_up(new)
        tokens += new


def test_ngram_is_silent_without_a_match_and_after_a_new_prompt() -> None:
    drafter = NgramDrafter(shortest=2)
    drafter.prefill([1, 2, 3])
    assert drafter.propose(4) == ([], None)
    drafter.catch_up([1, 2])
    assert drafter.propose(4) == ([3, 1, 2, 3], None)
    drafter.prefill([1, 2])
    assert drafter.propose(4) == ([], None)
    with pytest.raises(ValueError, match="shortest"):
        NgramDrafter(shortest=3, longest=2)


def greedy(model: FakeModel, tokens: list[int], length: int) -> list[int]:
    tokens = list(tokens)
    for _ in range(length):
        context = tuple(tokens[-model.order :])
        tokens.append(int(model.random_logits(context, len(tokens)).argmax()))
    return tokens[len(tokens) - length :]


def test_model_drafter_follows_any_history() -> None:
    """Accept none, some, all, and cycles without drafting: proposals are always the model's own,
    a function of all tokens so far, which it reads back from its cache.
    """
    rng = random.Random(1)
    model, tokens = FakeModel(6, order=400), [1, 2, 3]
    drafter = ModelDrafter(model, Sampler(SamplingConfig()), vocabulary=6, capacity=400)
    drafter.prefill(tokens)
    new = [4]
    for _ in range(40):
        drafter.catch_up(new)
        tokens += new
        drafts, q_NV = drafter.propose(length := rng.randint(1, 5))
        assert drafts == greedy(model, tokens, length) and q_NV is None
        accepted = rng.randint(0, length)
        new = drafts[:accepted] + [rng.randrange(6) for _ in range(rng.choice([1, 1, 7]))]


def test_model_drafter_uses_a_fixed_first_shape() -> None:
    rows: list[int] = []
    model = FakeModel(6, on_pass=rows.append)
    drafter = ModelDrafter(model, Sampler(SamplingConfig()), vocabulary=6, capacity=99)
    drafter.prefill([1, 2])
    drafter.catch_up([3])
    drafts, _ = drafter.propose(3)
    drafter.catch_up([*drafts, 5])  # accepted in full
    drafter.propose(2)
    assert rows == [2, 1, 1, 2, 1]


def test_model_drafter_ends_with_its_context() -> None:
    model = FakeModel(6, context=8)
    drafter = ModelDrafter(model, Sampler(SamplingConfig()), vocabulary=6, capacity=99)
    drafter.prefill([1, 2, 3])
    drafter.catch_up([4, 5])
    drafts, _ = drafter.propose(15)  # tokens at 5 … 8: the last one need not be fed
    assert len(drafts) == 4
    drafter.catch_up(drafts)
    assert drafter.propose(1) == ([], None)


def test_model_drafter_gives_up_on_ids_it_cannot_read() -> None:
    """Only a target whose embedding has more padding can say them."""
    drafter = ModelDrafter(FakeModel(6), Sampler(SamplingConfig()), vocabulary=6, capacity=99)
    drafter.prefill([1, 2, 3])
    drafter.catch_up([6])
    assert drafter.propose(3) == ([], None)
    drafter.catch_up([1, 2, 3])
    assert drafter.propose(3) == ([], None)


def test_vocabularies() -> None:
    pieces = ["a", "b", "c", "d"]
    full, fewer = fake_tokenizer(pieces), fake_tokenizer(pieces[:3])
    other = fake_tokenizer(["a", "b", "x", "d"])
    assert check_vocabularies(full, full, config_of(4), config_of(4)) == 4
    assert check_vocabularies(full, full, config_of(4), config_of(64)) == 4  # padding alone
    assert check_vocabularies(full, None, config_of(8), config_of(6)) == 4
    assert check_vocabularies(None, None, config_of(4), config_of(4)) == 4
    with pytest.raises(ValueError, match="token 2 is 'c' in the target's tokenizer and 'x'"):
        check_vocabularies(full, other, config_of(4), config_of(4))
    with pytest.raises(ValueError, match="token 3 is 'd' in the target's tokenizer and None"):
        check_vocabularies(full, fewer, config_of(4), config_of(4))
    with pytest.raises(ValueError, match="another vocabulary: 3 ids, of which the target has 4"):
        check_vocabularies(full, None, config_of(4), config_of(3))
    with pytest.raises(ValueError, match="another vocabulary: 5 ids, of which the target has 4"):
        check_vocabularies(None, None, config_of(4), config_of(5))
