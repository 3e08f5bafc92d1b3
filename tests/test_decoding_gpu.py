"""Decoding on CUDA: a row's bits in any company, and speculation that changes no token.

Run with `-m gpu`. The embedded pair is real enough for near-ties: in bf16 its logits often come
within one rounding of each other, so what depends on the number of rows shows as another token.
"""

from pathlib import Path

import pytest
import torch
from steady import check_nothing_is_compiled_and_nothing_allocated, plain_tokens
from triton import knobs

from draftnorm import SamplingConfig, generate, load_model, load_tokenizer, speculate
from draftnorm.decoding.drafters import ModelDrafter
from draftnorm.model import decode_step
from draftnorm.model.cache import KVCache
from draftnorm.model.config import ModelConfig
from draftnorm.model.decode_step import DecodeStep
from draftnorm.model.memory import WORK
from draftnorm.model.open_step import open_step
from draftnorm.model.transformer import Transformer
from draftnorm.scripts.shapes import SHAPES

pytestmark = pytest.mark.gpu
EMBEDDED = Path(__file__).resolve().parents[1] / "model" / "embedded"
PROMPTS = ["def add(a: int, b: int) -> int:\n", "class Stack:\n    def push(self, x):\n", "import "]


@pytest.fixture(scope="module")
def pair() -> tuple[Transformer, Transformer]:
    return tuple(load_model(EMBEDDED / name, device="cuda") for name in ("target", "draft"))


def random_tokens(B: int, T: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 8192, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("start", [9, 480], ids=["short", "over splits and tiers"])
@pytest.mark.parametrize("rows", [2, 5, 8, 16])
def test_a_row_has_the_same_bits_in_any_company(pair, rows: int, start: int) -> None:
    target, _ = pair
    end = start + 91
    tokens = random_tokens(1, end, rows)
    cache = KVCache(target.config, capacity=1024, device="cuda", dtype=target.dtype)
    step = open_step(
        target, cache, [(T, "asked") for T in range(1, rows + 1)], lengths=range(start, end + 1)
    )
    assert isinstance(step, DecodeStep)
    target.prefill(tokens[0, :start], cache)
    alone = [step.forward(tokens[:, t : t + 1])[0].clone() for t in range(start, end)]
    alone = torch.cat(alone)
    cache.rollback(start)
    for t in range(start, end, rows):
        together = step.forward(tokens[:, t : t + rows])[0]
        assert torch.equal(together, alone[t - start : t - start + rows])


def test_a_sequence_of_a_batch_has_the_bits_it_has_alone(pair) -> None:
    target, _ = pair
    tokens, starts = random_tokens(3, 300, 1), (5, 250, 17)
    together = KVCache(target.config, batch=3, capacity=320, device="cuda", dtype=target.dtype)
    steps = [open_step(target, together, [(5, "asked")], lengths=range(1, 321))]
    for b, start in enumerate(starts):
        alone = KVCache(target.config, capacity=320, device="cuda", dtype=target.dtype)
        steps.append(open_step(target, alone, [(5, "asked")], lengths=range(1, 321)))
        target.prefill(tokens[b, :start], alone)
        target.prefill(tokens[b, :start], together, sequence=b)
    for i in range(0, 30, 5):
        block = torch.stack([tokens[b, start + i :][:5] for b, start in enumerate(starts)])
        logits = steps[0].forward(block)
        for b, step in enumerate(steps[1:]):
            assert torch.equal(step.forward(block[b : b + 1])[0], logits[b])


@pytest.mark.parametrize(
    "sampling",
    [dict(), dict(temperature=0.8), dict(temperature=0.8, top_p=0.95)],
    ids=["greedy", "pure", "filtered"],
)
@pytest.mark.parametrize("draft_length", [1, 4, 7, 15, "auto"])
@pytest.mark.parametrize("drafter", ["draft", "target", "ngram"])
def test_speculation_changes_no_token(pair, drafter, draft_length, sampling: dict) -> None:
    target, draft = pair
    tokenizer = load_tokenizer(EMBEDDED / "target")
    options = dict(
        max_new_tokens=96,
        ignore_eos=True,
        sampling=SamplingConfig(seed=7, **sampling),
    )
    drafters = {"draft": draft, "target": target, "ngram": "ngram"}
    for prompt in [*PROMPTS, random_tokens(1, 470, 3)[0].tolist()]:  # the last crosses a tier
        plain = generate(target, tokenizer, prompt, **options).result()
        speculative = speculate(
            target, tokenizer, prompt, draft=drafters[drafter], draft_length=draft_length, **options
        ).result()
        assert speculative.token_ids == plain.token_ids


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("draft", [None, "ngram", "draft"])
def test_after_the_first_token_nothing_is_compiled_and_nothing_allocated(
    pair, draft, temperature: float, monkeypatch
) -> None:
    target, small = pair
    options = dict(
        max_new_tokens=300, ignore_eos=True, sampling=SamplingConfig(temperature=temperature)
    )
    run = (
        speculate(target, None, [5, 6, 7], draft=small if draft == "draft" else draft, **options)
        if draft
        else generate(target, None, [5, 6, 7], **options)
    )
    check_nothing_is_compiled_and_nothing_allocated(run, monkeypatch)


@pytest.mark.parametrize("draft", [None, "draft"])
def test_other_settings_need_no_other_kernel(pair, draft, monkeypatch) -> None:
    target, small = pair
    late: list[str] = []
    for i, settings in enumerate(
        (dict(), dict(top_k=5), dict(top_p=0.7), dict(min_p=0.1, seed=2**40), dict(temperature=3.0))
    ):
        sampling = SamplingConfig(**dict(temperature=0.8) | settings)
        options = dict(sampling=sampling, max_new_tokens=20)
        if draft:
            speculate(target, None, [5, 6, 7], draft=small, **options).result()
        else:
            generate(target, None, [5, 6, 7], **options).result()
        if i == 1:  # pure and filtered: from here on even opening a step compiles nothing
            hook = lambda *, repr, **_: late.append(repr)  # noqa: E731
            monkeypatch.setattr(knobs.runtime, "jit_cache_hook", hook)
            monkeypatch.setattr(decode_step, "compile_kernels", lambda work, _: work())
    assert late == []


@pytest.mark.parametrize("shape", ["embedded", "8B layers"])
def test_a_step_and_a_prompt_work_in_the_stated_memory(pair, shape: str) -> None:
    target, _ = pair
    if shape == "8B layers":  # two of 32; the head and a cache of 32k make the largest buffers
        config = ModelConfig(**SHAPES["llama-3.1-8b"] | dict(num_layers=2))
        target = Transformer(config, device="cuda", dtype=torch.bfloat16)
        for parameter in target.parameters():
            parameter.data.fill_(0.01)
    torch.cuda.reset_peak_memory_stats()
    before, length = torch.cuda.memory_allocated(), min(target.config.context, 32768)
    run = speculate(target, None, [7] * (length - 40), max_new_tokens=20, ignore_eos=True)
    run.result()
    cache = run.decoder.cache
    kept = sum(layer.nbytes for layer in cache.keys + cache.values)
    assert torch.cuda.max_memory_allocated() - before - kept < WORK


def test_an_early_end_leaves_the_cache_where_the_output_ends(pair) -> None:
    target, _ = pair
    options = dict(max_new_tokens=64, ignore_eos=True)
    tokens = generate(target, None, [5, 6, 7], **options).result().token_ids
    run = generate(target, None, [5, 6, 7], **options)
    for _ in range(9):
        next(run)
    run.close()
    assert run.result().token_ids == tokens[:9]
    decoder = run.decoder
    assert decoder.cache.lengths == [3 + 8]
    # Two more steps were in flight; what they wrote and chose is nobody's.
    assert tuple(plain_tokens(decoder.engine, tokens[8], 20)) == tokens[9:29]


def test_broken_weights_are_an_error(pair) -> None:
    target, _ = pair
    for draft in (None, "ngram"):
        run = speculate(target, None, [5, 6]) if draft else generate(target, None, [5, 6])
        next(run)
        run.decoder.cache.values[-1].fill_(torch.nan)
        with pytest.raises(ValueError, match="logits at position 3 hold NaN"):
            next(run)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_one_broken_logit_is_an_error(pair, temperature: float, value: float) -> None:
    target, _ = pair
    head = target.head_VD().detach()
    saved = head[7:9].clone()
    options = dict(sampling=SamplingConfig(temperature=temperature))
    for start in (generate, speculate):
        run = start(target, None, [5, 6], **options)
        next(run)
        try:
            # Whatever the sign of what they meet: one logit is infinite, the other excluded.
            head[7, 0], head[8, 0] = value, -value
            with pytest.raises(ValueError, match="logits at position 3 hold NaN or infinity"):
                list(run)
        finally:
            head[7:9] = saved


def test_a_drafter_proposes_what_its_model_says(pair) -> None:
    _, draft = pair
    prompt = random_tokens(1, 40, 5)[0].tolist()
    sampler = generate(draft, None, prompt).decoder.sampler
    drafter = ModelDrafter(draft, sampler, vocabulary=draft.config.vocab_size, capacity=128)
    drafter.prefill(prompt)
    cache = KVCache(draft.config, capacity=128, device="cuda", dtype=draft.dtype)
    step = open_step(draft, cache, [(1, "asked"), (2, "asked")], lengths=range(1, 128))
    draft.prefill(prompt[:-2], cache)
    rows, expected = prompt[-2:], []
    for _ in range(9):
        expected.append(int(step.forward([rows])[0, -1].argmax()))
        rows = expected[-1:]
    assert drafter.propose(9)[0] == expected


def test_logits_match_the_cpu(pair) -> None:
    target, _ = pair
    exact = load_model(EMBEDDED / "target", device="cpu", dtype=torch.float32)
    tokens = random_tokens(1, 64, 0)
    with torch.no_grad():
        actual, expected = target(tokens.to("cuda"))[0].float().cpu(), exact(tokens)[0]
    # bf16 carries 2⁻⁹ a rounding through some thirty roundings in a row; a row that another expert
    # takes at a near-tie differs by more, hence the median over rows.
    errors = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.median() < 0.03
