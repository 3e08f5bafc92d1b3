"""The embedded pair is whole, small, what its cards say, and works with nothing fetched."""

import ast
import hashlib
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from draftnorm import generate, load_model, load_tokenizer, speculate
from draftnorm.model.training import router_losses

FOLDER = Path(__file__).resolve().parents[1] / "model" / "embedded"
OURS = Path(__file__).read_text()  # Python that no model was trained on


@pytest.fixture(scope="module")
def target():
    return load_model(FOLDER / "target", device="cpu")


@pytest.fixture(scope="module")
def draft():
    return load_model(FOLDER / "draft", device="cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(FOLDER / "target")


@pytest.mark.parametrize("name", ["target", "draft"])
def test_every_file_has_its_checksum(name):
    lines = (FOLDER / name / "SHA256SUMS").read_text().splitlines()
    listed = dict(reversed(line.split("  ")) for line in lines)
    files = {path.name for path in (FOLDER / name).iterdir()} - {"SHA256SUMS"}
    assert set(listed) == files
    for file, checksum in listed.items():
        content = (FOLDER / name / file).read_bytes()
        assert hashlib.sha256(content).hexdigest() == checksum, file


def test_the_pair_is_small(target, draft):
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 26e6
    assert 10e6 <= target.config.parameters <= 12e6
    embedding = draft.config.vocab_size * draft.config.hidden_size
    assert draft.config.parameters - embedding <= 1e6
    assert (target.config.architecture, draft.config.architecture) == ("mixtral", "llama")


def test_both_have_one_vocabulary(tokenizer):
    assert load_tokenizer(FOLDER / "draft").tokens == tokenizer.tokens
    assert tokenizer.vocab_size == 8192


@pytest.mark.parametrize("text", [OURS, "\tif x:\r\n\t  y = 12345  \n\n", "é ∑ 🙂\f"])
def test_text_comes_back_exactly(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id == 1 and tokenizer.eos_token_ids == (2,)
    assert tokenizer.decode(ids[1:]) == text


def test_the_target_knows_python_and_uses_every_expert(target, tokenizer):
    tokens = torch.tensor([tokenizer.encode(OURS)[:1024]])
    router_logits: list[torch.Tensor] = []
    with torch.no_grad():
        logits = target(tokens[:, :-1], router_logits=router_logits)
    nats = cross_entropy(logits[0], tokens[0, 1:]).item()
    assert nats < math.log(tokenizer.vocab_size) / 2.5  # 3.6 of the 9.0 of guessing
    share_LE = router_losses(router_logits, target.config.experts_per_token)[2]
    assert share_LE.min() > 0.005


@pytest.mark.parametrize("name", ["target", "draft"])
def test_transformers_computes_the_same_logits(name, request, tokenizer):
    transformers = pytest.importorskip("transformers")
    ours = request.getfixturevalue(name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(FOLDER / name, dtype=torch.float32)
    tokens = torch.tensor([tokenizer.encode(OURS)[:200]])
    with torch.no_grad():
        # Logits of size 10 after 6 layers of fp32: 1e-6 relative an operation stays below 1e-3.
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-3)


def test_speculation_gives_plain_decodings_tokens(target, draft, tokenizer):
    prompt = (FOLDER / "target" / "prompt.txt").read_text()
    plain = generate(target, tokenizer, prompt, max_new_tokens=64).result()
    result = speculate(
        target, tokenizer, prompt, draft=draft, draft_length=4, max_new_tokens=64
    ).result()
    assert result.token_ids == plain.token_ids
    assert result.speculation.acceptance_rate > 0.55  # the goal of the whole evaluation


def test_the_built_in_prompt_is_the_head_of_a_function():
    prompt = (FOLDER / "target" / "prompt.txt").read_text()
    assert prompt.endswith("\n")
    ast.parse(prompt + "    pass\n")
