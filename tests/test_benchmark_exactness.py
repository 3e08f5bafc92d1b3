"""`draftnorm benchmark exactness` on the CPU: what it compares, and that a difference fails it."""

import json

import pytest

from draftnorm.model.transformer import Transformer
from draftnorm.scripts.main import main

SMALL = "--device cpu -p 9 --steps 12 --rows 2,5 --draft-length 2,auto -n 6 -o json".split()


@pytest.fixture
def climb(make_checkpoint, capsys):
    def run() -> tuple[int, dict]:
        code = main(["benchmark", "exactness", "--target", str(make_checkpoint()), *SMALL])
        return code, json.loads(capsys.readouterr().out)

    return run


def test_every_level_is_compared_and_equal(climb) -> None:
    code, document = climb()
    assert code == 0 and document["equal"] is True
    rows = {(row["level"], row["what"]): row for row in document["results"]}
    assert all(row["equal"] == row["compared"] for row in rows.values())
    assert {level for level, _ in rows} == {"model", "cache", "tokens"}  # no kernels of our own
    assert rows["model", "verify of 5"]["compared"] == 10  # two of them fit 12 steps
    assert rows["cache", "verify of 5"]["compared"] == 10 * 2 * 2  # two layers, keys and values
    assert rows["model", "first of 5, the others wrong"]["compared"] == 12
    for drafter in ("n-grams", "itself", "random tokens"):
        assert rows["tokens", f"drafts by {drafter}, 2"]["compared"] == 2 * 2 * 6


def test_a_row_that_depends_on_its_company_fails(climb, monkeypatch) -> None:
    decode = Transformer.decode

    def other_bits(self, tokens, cache):
        logits_BTV = decode(self, tokens, cache)
        return logits_BTV if logits_BTV.shape[1] == 1 else logits_BTV * (1 + 2**-20)

    monkeypatch.setattr(Transformer, "decode", other_bits)
    code, document = climb()
    assert code == 1 and document["equal"] is False
    differing = [r["what"] for r in document["results"] if r["equal"] < r["compared"]]
    assert differing == ["verify of 2", "verify of 5", "first of 5, the others wrong"]


def test_a_verify_that_leaves_another_cache_fails(climb, monkeypatch) -> None:
    decode = Transformer.decode

    def forgetful(self, tokens, cache):
        logits_BTV = decode(self, tokens, cache)
        if logits_BTV.shape[1] == 5:
            cache.keys[-1][:, :, cache.lengths[0] - 1] = 0.0  # no later layer to upset
        return logits_BTV

    monkeypatch.setattr(Transformer, "decode", forgetful)
    code, document = climb()
    row = next(
        r for r in document["results"] if (r["level"], r["what"]) == ("cache", "verify of 5")
    )
    assert code == 1 and row["compared"] - row["equal"] == 2  # the last of each


def test_arguments_that_exclude_each_other_are_one_line(capsys) -> None:
    assert main("benchmark exactness --shape llama-3.2-1b --draft ngram".split()) == 1
    assert main("benchmark exactness --device cpu -p 8000 --steps 9000".split()) == 1
    assert capsys.readouterr().err.count("\n") == 2
