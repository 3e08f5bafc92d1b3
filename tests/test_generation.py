"""Endings, stop strings, chunks, prompts and results, in plain decoding and under speculation."""

import math

import pytest
import torch
from fake_model import FakeModel, ScriptedDrafter, fake_tokenizer

from draftnorm.decoding.generation import generate
from draftnorm.decoding.speculation import speculate
from draftnorm.model.cache import KVCache


def reciting(text_ids: list[int], vocab_size: int, **options) -> FakeModel:
    """A model that continues any prompt with these ids, by absolute position, then id 0."""

    def logits_of(tokens: tuple[int, ...], position: int) -> torch.Tensor:
        wanted = text_ids[position - 1] if position - 1 < len(text_ids) else 0
        return torch.nn.functional.one_hot(torch.tensor(wanted), vocab_size).float()

    return FakeModel(vocab_size, logits_of, **options)


PIECES = [".", "a", "b", "c", "ab", "bc", "abc", "<", "/", "s>", "é".encode()[:1], "é".encode()[1:]]
ID = {piece: i for i, piece in enumerate(PIECES)}


def run(pieces: list, how: str, **options):
    """Recite pieces after a one-token prompt; returns (result, chunks)."""
    ids = [ID[piece] for piece in pieces]
    model, tokenizer = reciting(ids, len(PIECES)), fake_tokenizer(PIECES)
    options = dict(max_new_tokens=len(ids)) | options
    if how == "plain":
        generation = generate(model, tokenizer, [0], **options)
    else:
        # Right drafts only, so that the whole text comes in blocks of `how` + 1 tokens.
        right = ScriptedDrafter(lambda tokens, n: ids[len(tokens) - 1 : len(tokens) - 1 + n])
        generation = speculate(model, tokenizer, [0], draft=right, draft_length=how, **options)
    chunks = list(generation)
    return generation.result(), chunks


HALF, REST = PIECES[10], PIECES[11]
# pieces, stop strings -> text, number of tokens kept, why it ended
STOPS = [
    (["a", "b", "c"], ["b"], "a", 1, "stop_string"),
    (["a", "<", "/", "s>", "c"], ["</s>"], "a", 1, "stop_string"),  # across three borders
    (["a", "<", "/", "c", "b"], ["</s>"], "a</cb", 5, "length"),  # began to form, did not
    (["a", "<", "/"], ["</s>"], "a</", 3, "length"),  # was forming at the end
    (["a", "abc", "c"], ["bc"], "aa", 2, "stop_string"),  # inside a token: it covers the start
    (["ab", "c", "a"], ["bc"], "a", 1, "stop_string"),  # ends in another token
    (["abc", "a"], ["c", "b"], "a", 1, "stop_string"),  # the earliest match counts
    (["a", "a", "b"], ["aab"], "", 0, "stop_string"),  # everything is cut
    (["a", "a", "a", "b", "."], ["aab"], "a", 1, "stop_string"),  # overlapping beginnings
    (["a", HALF, REST, "b"], ["é"], "a", 1, "stop_string"),  # a character of two tokens
    (["a", HALF, REST, "b"], ["b"], "aé", 3, "stop_string"),
    (["a", HALF], ["b"], "a\ufffd", 2, "length"),
    (["a", "b", "c"], [], "abc", 3, "length"),
]


@pytest.mark.parametrize("how", ["plain", 1, 2, 3, 5, 15])
@pytest.mark.parametrize(("pieces", "stop", "text", "kept", "reason"), STOPS)
def test_stop_strings(pieces, stop, text, kept, reason, how) -> None:
    result, chunks = run(pieces, how, stop=stop)
    assert (result.text, result.stop_reason) == (text, reason)
    assert list(result.token_ids) == [ID[piece] for piece in pieces[:kept]]
    assert "".join(chunk.text for chunk in chunks) == text
    assert sum((chunk.token_ids for chunk in chunks), ()) == result.token_ids
    if result.speculation and result.token_ids:
        statistics = result.speculation
        assert statistics.cycles + statistics.accepted - statistics.discarded == kept - 1


def test_text_is_held_back_only_while_a_stop_string_could_form() -> None:
    _, chunks = run(["a", "<", "/", "c", "b"], "plain", stop=["</s>"])
    assert [chunk.text for chunk in chunks] == ["a", "</c", "b"]
    assert [len(chunk.token_ids) for chunk in chunks] == [1, 3, 1]


def test_the_rest_of_a_token_shown_in_part_comes_without_ids() -> None:
    _, chunks = run(["ab", "c", "."], "plain", stop=["b.", "c<"])
    shown = [(chunk.text, chunk.token_ids) for chunk in chunks]
    assert shown == [("a", (ID["ab"],)), ("b", ()), ("c.", (ID["c"], ID["."]))]


def test_no_half_characters() -> None:
    _, chunks = run(["a", HALF, REST], "plain")
    assert [chunk.text for chunk in chunks] == ["a", "", "é"]


def test_the_stop_token_is_a_token_but_not_text() -> None:
    ids = [ID["a"], ID["b"], ID["c"], ID["a"]]
    tokenizer = fake_tokenizer(PIECES, eos_token_ids=(ID["c"],))
    model = reciting(ids, len(PIECES))
    result = generate(model, tokenizer, [0]).result()
    assert (result.text, result.stop_reason) == ("ab", "stop_token")
    assert list(result.token_ids) == ids[:3]
    ignoring = generate(model, tokenizer, [0], ignore_eos=True, max_new_tokens=4).result()
    assert (ignoring.text, ignoring.stop_reason) == ("abca", "length")


def test_prompts_as_text_and_chat() -> None:
    template = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}."
    pieces = [".", "a", "b", "u", "s"]
    model = FakeModel(5)
    plain, chat = fake_tokenizer(pieces), fake_tokenizer(pieces, chat_template=template)
    options = dict(max_new_tokens=0)
    assert generate(model, plain, "ab", **options).result().prompt_tokens == 2
    assert generate(model, chat, "ab", **options).result().prompt_tokens == 4
    assert generate(model, chat, "ab", chat=False, **options).result().prompt_tokens == 2
    assert generate(model, chat, "ab", system="b", **options).result().prompt_tokens == 6


def test_invalid_prompts() -> None:
    model, tokenizer = FakeModel(12, context=8), fake_tokenizer(PIECES)
    for prompt, options, message in [
        ("", dict(), "prompt is empty"),
        ([], dict(), "prompt is empty"),
        ([12], dict(), "token id 12 is outside the vocabulary of 12 ids"),
        ([-1], dict(), "token id -1"),
        ([1] * 9, dict(), "the prompt has 9 tokens, the context only 8"),
        ([1] * 4, dict(context=3), "the prompt has 4 tokens, the context only 3"),
        ([1], dict(context=0), "context must be 1 … 8"),
        ([1], dict(max_new_tokens=-1), "max_new_tokens"),
        ([1], dict(max_new_tokens=2.5), "max_new_tokens"),
        ([1], dict(max_new_tokens=2.0), "max_new_tokens"),
        ([1], dict(max_new_tokens=math.inf), "max_new_tokens"),
        ([1], dict(max_new_tokens="8"), "max_new_tokens"),
        ([1], dict(context=2.5), "context"),
        ([1], dict(context=math.nan), "context"),
        ([1], dict(stop=[""]), "stop strings"),
        ([1], dict(request_id=-1), "request id"),
        ("a", dict(system="b"), "chat template"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            generate(model, tokenizer, prompt, **options)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        generate(model, None, "text")


def test_prompt_at_capacity_gives_no_token() -> None:
    result = generate(FakeModel(12, context=8), None, [1] * 8).result()
    assert (result.token_ids, result.stop_reason) == ((), "context")
    assert result.time_to_first_token is None and result.tokens_per_second is None


@pytest.mark.parametrize("speculative", [False, True])
def test_an_interrupt_keeps_what_had_come(speculative: bool) -> None:
    passes = [0]

    def interrupt(rows: int) -> None:
        passes[0] += 1
        if passes[0] == 6:
            raise KeyboardInterrupt

    model = FakeModel(12, on_pass=interrupt)
    generation = (
        speculate(model, None, [1, 2, 1, 2], draft_length=2)
        if speculative
        else generate(model, None, [1, 2, 1, 2])
    )
    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        for chunk in generation:
            seen += chunk.token_ids
    result = generation.result()
    assert list(result.token_ids) == seen and len(seen) >= 6
    assert result.stop_reason == "interrupted"
    if speculative:
        assert result.speculation.cycles == 5


def test_an_interrupted_cycle_leaves_the_cache_where_the_output_ends() -> None:
    class Interrupted(FakeModel):
        def decode(self, tokens_BT: list[list[int]], cache: KVCache) -> torch.Tensor:
            super().decode(tokens_BT, cache)  # the rows of all drafts are in the cache now
            raise KeyboardInterrupt

    drafter = ScriptedDrafter(lambda tokens, n: [1] * n)
    generation = speculate(Interrupted(12), None, [1, 2], draft=drafter, draft_length=3)
    with pytest.raises(KeyboardInterrupt):
        list(generation)
    assert len(generation.result().token_ids) == 1
    assert generation.decoder.cache.lengths == [2]


def test_close_ends_early_and_releases_held_text() -> None:
    ids = [ID["a"], ID["<"], ID["a"]]
    generation = generate(reciting(ids, 12), fake_tokenizer(PIECES), [0], stop="<<<")
    assert next(generation).text == "a"
    generation._advance()
    generation.close()
    assert "".join(chunk.text for chunk in generation) == "<"
    assert generation.result().stop_reason == "interrupted"


def test_times_come_from_the_clock_and_leave_out_the_caller() -> None:
    now = [0.0]

    def spend(seconds: float) -> None:
        now[0] += seconds

    model = FakeModel(12, on_pass=lambda rows: spend(2.0))
    generation = generate(model, None, [1], max_new_tokens=5, clock=lambda: now[0])
    for _ in generation:
        spend(100.0)  # a slow reader
    result = generation.result()
    assert result.seconds == 8.0 and result.tokens_per_second == 0.5
    assert result.prefill_seconds == {"target": 0.0, "draft": None}


def test_results_are_json() -> None:
    import json

    result, _ = run(["a", "b", "c"], 2)
    document = json.loads(json.dumps(result.to_json()))
    assert document["token_ids"] == [1, 2, 3]
    assert document["speculation"]["accepted"] == 1
    assert document["stop_reason"] == "length"


def test_inference_mode_does_not_leak_into_the_caller() -> None:
    for _ in generate(FakeModel(12), None, [1], max_new_tokens=3):
        assert not torch.is_inference_mode_enabled()
