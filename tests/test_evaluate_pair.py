"""The yardsticks of the evaluation: n-grams, function heads, bits a byte, intervals."""

import itertools
import json
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from draftnorm.scripts import evaluate_pair
from draftnorm.scripts.ngram import ngram_nats

SOURCE = '''\
import os

def short(a): return a

class A:
    def method(self, x):
        """Docstring."""
        y = x
        return y

@decorated
def top(
    a,
    b=1,
):
    """Two
    lines."""
    c = a + b
    return c
'''


def kneser_ney(train: list[int], V: int, order: int, context: tuple, word: int) -> float:
    """The textbook recursion with dictionaries (Chen & Goodman 1999, eq. 21), ring-shaped text."""
    ring = train[-order:] + train
    grams = [
        Counter(tuple(ring[i - n + 1 : i + 1]) for i in range(order, len(ring)))
        for n in range(1, order + 1)
    ]
    p = 1 / V
    for n in range(1, order + 1):
        counts = grams[n - 1]
        if n < order:
            counts = Counter(gram[1:] for gram in grams[n])
        c = context[len(context) - n + 1 :]
        followers = {g: k for g, k in counts.items() if g[:-1] == c}
        if not followers:
            break
        total, types = sum(followers.values()), len(followers)
        p = (max(followers.get((*c, word), 0) - 0.75, 0) + 0.75 * types * p) / total
    return p


@pytest.mark.parametrize("order", [1, 2, 3])
def test_ngrams_match_the_textbook_recursion(order):
    generator = torch.Generator().manual_seed(0)
    train = torch.randint(0, 4, (60,), generator=generator)
    held_out = torch.randint(0, 4, (25,), generator=generator)
    ring = held_out[-order:].tolist() + held_out.tolist()
    expected = -sum(
        math.log(kneser_ney(train.tolist(), 4, order, tuple(ring[i - order + 1 : i]), ring[i]))
        for i in range(order, len(ring))
    )
    nats = ngram_nats(train, held_out, 4, order) * len(held_out)
    assert nats == pytest.approx(expected, rel=1e-9)  # fp64 throughout


def test_ngrams_are_measured_in_bits_of_the_validation_text(tmp_path) -> None:
    tokens = {"train": [1, 2, 3, 1, 2, 3, 1], "validation": [1, 2, 3]}
    for split, ids in tokens.items():
        np.array(ids, dtype=np.uint16).tofile(tmp_path / f"{split}.bin")
    record = {"package": "p", "path": "a.py", "text": "ab\n"}
    (tmp_path / "validation.jsonl").write_text(json.dumps(record) + "\n")
    nats = ngram_nats(torch.tensor(tokens["train"]), torch.tensor(tokens["validation"]), 4)
    bits = evaluate_pair.ngram_bits_per_byte(tmp_path, 4)
    assert bits == pytest.approx(nats * 3 / math.log(2) / 3)


def test_ngram_probabilities_sum_to_one():
    train = [0, 1, 2, 3, 1, 2, 0, 2, 1, 3]
    for context in itertools.product(range(4), repeat=2):
        total = sum(kneser_ney(train, 4, 3, context, word) for word in range(4))
        assert total == pytest.approx(1.0)


def test_heads_end_after_signature_and_docstring():
    heads = list(evaluate_pair.function_heads(SOURCE, context_lines=0))
    assert heads == ['def top(\n    a,\n    b=1,\n):\n    """Two\n    lines."""\n']
    with_context = list(evaluate_pair.function_heads(SOURCE, context_lines=2))
    assert any(
        head.endswith('def method(self, x):\n        """Docstring."""\n') for head in with_context
    )


def write_split(folder, split: str, *texts: str) -> None:
    lines = (json.dumps({"package": "p", "path": "a.py", "text": text}) for text in texts)
    (folder / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines))


def test_a_corpus_too_small_to_measure_on_is_refused(tmp_path) -> None:
    long = SOURCE.replace("Two", "Two" * 1_000)  # both of its heads are past the longest prompt
    write_split(tmp_path, "prompts", long)
    with pytest.raises(ValueError, match="have 0 function heads, not 1"):
        evaluate_pair.choose_prompts(tmp_path, 1, context_lines=0)
    write_split(tmp_path, "validation", "x" * 3_000, "x" * 1_000)
    with pytest.raises(ValueError, match="have 1 files of 2,000 to 8,000 characters, not 24"):
        evaluate_pair.choose_files(tmp_path)


def test_files_of_text_are_of_all_packages_alike(tmp_path) -> None:
    write_split(tmp_path, "validation", *(str(i).zfill(3_000) for i in range(49)))
    chosen = [int(text) for text in evaluate_pair.choose_files(tmp_path)]
    assert chosen == list(range(0, 48, 2))


@pytest.mark.parametrize(
    ("completion", "function", "ended"),
    [
        ("    return 1\n\n\ndef g():\n    pass", "    return 1\n\n\n", True),
        ("    return 1\n    x = (", "    return 1\n", False),
        ("    return 1\n", "    return 1\n", False),
    ],
)
def test_a_completion_is_cut_at_the_functions_end(completion, function, ended):
    assert evaluate_pair.cut_at_function_end("def f():\n", completion) == (
        "def f():\n" + function,
        ended,
    )


def test_bits_per_byte_of_a_uniform_model():
    def uniform(tokens: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*tokens.shape, 16)

    uniform.device = torch.device("cpu")
    tokenizer = SimpleNamespace(
        bos_token_id=1, encode=lambda text, add_special: [ord(c) % 16 for c in text]
    )
    # One token a byte, four bits a token, whatever the windows.
    assert evaluate_pair.bits_per_byte(uniform, tokenizer, ["abcdefg" * 9, "xyz"], window=8) == (
        pytest.approx(4.0)
    )


def test_the_interval_covers_the_mean_and_shrinks_with_more_prompts():
    generator = np.random.Generator(np.random.Philox(0))
    widths = []
    for prompts in (50, 800):
        sums = generator.integers(0, 40, prompts)
        low, high = evaluate_pair._interval(sums, np.full(prompts, 10))
        assert low < sums.mean() / 10 < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 3  # four times narrower in expectation
