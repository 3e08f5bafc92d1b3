"""Decoding on CUDA: a row's bits in any company, and speculation that changes no token.

Run with `-m gpu`. The embedded pair is real enough for near-ties: in bf16 its logits often come
within one rounding of each other, so what depends on the number of rows shows as another token.
"""

from pathlib import Path

import pytest
import torch

from draftnorm import SamplingConfig, generate, load_model, load_tokenizer, speculate
from draftnorm.model.cache import KVCache
from draftnorm.model.transformer import Transformer

pytestmark = pytest.mark.gpu
EMBEDDED = Path(__file__).resolve().parents[1] / "model" / "embedded"
PROMPTS = ["def add(a: int, b: int) -> int:\n", "class Stack:\n    def push(self, x):\n", "import "]


@pytest.fixture(scope="module")
def pair() -> tuple[Transformer, Transformer]:
    return tuple(load_model(EMBEDDED / name, device="cuda") for name in ("target", "draft"))


@pytest.mark.parametrize("rows", [2, 5, 8, 16, 17, 33])
def test_a_row_has_the_same_bits_in_any_company(pair, rows: int) -> None:
    target, _ = pair
    tokens = torch.randint(3, 8192, (1, 100), generator=torch.Generator().manual_seed(rows))
    tokens = tokens.to("cuda")
    cache = KVCache(target.config, capacity=100, device="cuda", dtype=target.dtype)
    target.prefill(tokens[0, :9], cache)
    alone = torch.cat([target.decode(tokens[:, t : t + 1], cache)[0] for t in range(9, 100)])
    cache.rollback(9)
    for t in range(9, 100, rows):
        together = target.decode(tokens[:, t : t + rows], cache)[0]
        assert torch.equal(together, alone[t - 9 : t - 9 + rows])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("draft_length", [1, 4, 7, 15, "auto"])
@pytest.mark.parametrize("drafter", ["draft", "target", "ngram"])
def test_speculation_changes_no_token(pair, drafter, draft_length, temperature: float) -> None:
    target, draft = pair
    tokenizer = load_tokenizer(EMBEDDED / "target")
    options = dict(
        max_new_tokens=96,
        ignore_eos=True,
        sampling=SamplingConfig(temperature=temperature, top_p=0.95, seed=7),
    )
    drafters = {"draft": draft, "target": target, "ngram": "ngram"}
    for prompt in PROMPTS:
        plain = generate(target, tokenizer, prompt, **options).result()
        speculative = speculate(
            target, tokenizer, prompt, draft=drafters[drafter], draft_length=draft_length, **options
        ).result()
        assert speculative.token_ids == plain.token_ids


def test_logits_match_the_cpu(pair) -> None:
    target, _ = pair
    exact = load_model(EMBEDDED / "target", device="cpu", dtype=torch.float32)
    tokens = torch.randint(3, 8192, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        actual, expected = target(tokens.to("cuda"))[0].float().cpu(), exact(tokens)[0]
    # bf16 carries 2⁻⁹ a rounding through some thirty roundings in a row; a row that another expert
    # takes at a near-tie differs by more, hence the median over rows.
    errors = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.median() < 0.03
