"""What the embedded pair is worth, on packages it never saw: `draftnorm train evaluate`.

Bits a byte beside a 5-gram model and, if given, another checkpoint; tokens per cycle and acceptance
with 95 % intervals; how many greedy completions of function heads are Python; routing.

Shapes: B sequences, T tokens, V vocabulary.
"""

import ast
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from draftnorm.decoding.generation import generate
from draftnorm.decoding.sampling import SamplingConfig
from draftnorm.decoding.speculation import speculate
from draftnorm.model.checkpoint import load_model
from draftnorm.model.corpus import TokenBlocks, read_split
from draftnorm.model.tokenizer import load_tokenizer
from draftnorm.model.training import evaluate
from draftnorm.scripts.ngram import ngram_nats

DRAFT_LENGTH, NEW_TOKENS = 4, 128
LONGEST_PROMPT = 2_000  # characters
FILES_OF_TEXT = 24  # on which bits a byte are compared: SmolLM2 takes minutes for them


def function_heads(source: str, *, context_lines: int) -> Iterator[str]:
    """Every function up to the end of its signature or docstring, after the lines before it.

    With context_lines = 0 only functions of the module's top level, which parse on their own.
    """
    lines = source.splitlines(keepends=True)
    tree = ast.parse(source)
    nodes = tree.body if context_lines == 0 else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.FunctionDef) and len(node.body) > 2:
            first = node.body[0]
            documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            end = first.end_lineno if documented else first.lineno - 1
            start = max(0, node.lineno - 1 - context_lines)
            if end >= node.lineno and first.lineno > node.lineno:
                yield "".join(lines[start:end])


def choose_prompts(corpus: Path, count: int, *, context_lines: int) -> list[str]:
    """`count` function heads of the prompt packages, evenly over all there are."""
    heads = []
    for record in read_split(corpus, "prompts"):
        try:
            heads += function_heads(record["text"], context_lines=context_lines)
        except SyntaxError:
            continue
    heads = [head for head in heads if len(head) < LONGEST_PROMPT]
    if len(heads) < count:
        raise ValueError(f"the prompt packages have {len(heads)} function heads, not {count}")
    return [heads[i * len(heads) // count] for i in range(count)]


def choose_files(corpus: Path) -> list[str]:
    """FILES_OF_TEXT files of the validation packages, of all of them alike."""
    files = [r["text"] for r in read_split(corpus, "validation") if 2_000 < len(r["text"]) < 8_000]
    if len(files) < FILES_OF_TEXT:
        raise ValueError(
            f"the validation packages have {len(files)} files of 2,000 to 8,000 characters, "
            f"not {FILES_OF_TEXT}"
        )
    return files[:: len(files) // FILES_OF_TEXT][:FILES_OF_TEXT]


@torch.no_grad()
def bits_per_byte(model, tokenizer, texts: Sequence[str], window: int = 1024) -> float:
    """Cross-entropy of whole files, in windows that each begin with BOS, over their UTF-8 bytes."""
    nats = 0.0
    for text in texts:
        ids = tokenizer.encode(text, add_special=False)
        for start in range(0, len(ids), window - 1):
            tokens = torch.tensor([[tokenizer.bos_token_id, *ids[start : start + window - 1]]])
            logits_TV = model(tokens[:, :-1].to(model.device))[0].float()
            nats += cross_entropy(logits_TV, tokens[0, 1:].to(model.device), reduction="sum").item()
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def ngram_bits_per_byte(corpus: Path, vocab_size: int) -> float:
    """Of a 5-gram model of all training on all validation tokens; 0.1 GB a million tokens."""
    train_N, held_out_T = (
        torch.from_numpy(np.fromfile(corpus / f"{split}.bin", np.uint16).astype(np.int64))
        for split in ("train", "validation")
    )
    size = sum(len(record["text"].encode()) for record in read_split(corpus, "validation"))
    nats = ngram_nats(train_N, held_out_T, vocab_size)
    return nats * len(held_out_T) / math.log(2) / size


def measure_cycles(
    target, draft, tokenizer, prompts: Sequence[str], sampling: SamplingConfig, acceptance: str
) -> dict:
    """Tokens per cycle, acceptance and its share by position, over all prompts.

    The last cycle of a completion may be cut by a stop or by the budget; it is counted apart and
    left out of every rate. Intervals: bootstrap over prompts.
    """
    cycles: list[list[int]] = []  # of each prompt, the accepted drafts of each whole cycle
    cut = 0
    for number, prompt in enumerate(prompts):
        generation = speculate(
            target,
            tokenizer,
            prompt,
            draft=draft,
            draft_length=DRAFT_LENGTH,
            acceptance=acceptance,
            sampling=sampling,
            max_new_tokens=NEW_TOKENS,
            request_id=number,
        )
        # A block is the accepted drafts, if any, and then one token of the target's own.
        accepted, blocks = 0, []
        for chunk in generation:
            if chunk.drafted:
                accepted += len(chunk.token_ids)
            else:
                for _ in chunk.token_ids:
                    blocks.append(accepted)
                    accepted = 0
        whole = blocks[1:-1]  # the first token is the prefill's
        cut += len(blocks) > 1 or accepted > 0
        cycles.append(whole)
    flat = [accepted for whole in cycles for accepted in whole]
    by_position = [
        sum(a > i for a in flat) / max(1, sum(a >= i for a in flat)) for i in range(DRAFT_LENGTH)
    ]
    low, high = _interval([sum(c) for c in cycles], [len(c) for c in cycles])
    mean = sum(flat) / len(flat)
    return {
        "prompts": len(prompts),
        "cycles": len(flat),
        "cycles_cut": cut,
        "tokens_per_cycle": 1 + mean,
        "tokens_per_cycle_95": [1 + low, 1 + high],
        "acceptance_rate": mean / DRAFT_LENGTH,
        "acceptance_rate_95": [low / DRAFT_LENGTH, high / DRAFT_LENGTH],
        "acceptance_by_position": by_position,
    }


def _interval(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """95 % interval of Σ sums / Σ counts under resampling of prompts."""
    sums, counts = np.array(sums), np.array(counts)
    chosen = np.random.Generator(np.random.Philox(0)).integers(len(sums), size=(4000, len(sums)))
    low, high = np.percentile(sums[chosen].sum(1) / counts[chosen].sum(1), (2.5, 97.5))
    return float(low), float(high)


def cut_at_function_end(head: str, completion: str) -> tuple[str, bool]:
    """The function alone: up to the first line that is not indented; and whether there was one."""
    kept = []
    for line in completion.splitlines(keepends=True):
        if line.strip() and not line[0].isspace():
            return head + "".join(kept), True
        kept.append(line)
    if kept and not kept[-1].endswith("\n"):
        kept.pop()  # the budget ended inside this line
    return head + "".join(kept), False


def count_parsing(target, tokenizer, heads: Sequence[str]) -> dict:
    """How many greedy completions of function heads, cut at the function's end, are Python."""
    parsed = ended = 0
    for head in heads:
        text = generate(target, tokenizer, head, max_new_tokens=2 * NEW_TOKENS).result().text
        function, has_end = cut_at_function_end(head, text)
        ended += has_end
        try:
            ast.parse(function)
            parsed += 1
        except SyntaxError:
            pass
    return {"heads": len(heads), "parsed": parsed, "reached_the_end": ended}


def evaluate_pair(
    corpus: Path, target_folder: Path, draft_folder: Path, other: Path | None, count: int
) -> dict:
    """Everything above for one pair of checkpoints, as one dictionary. Runs on the CPU in fp32."""
    target, draft = (load_model(f, device="cpu") for f in (target_folder, draft_folder))
    tokenizer = load_tokenizer(target_folder)
    prompts = choose_prompts(corpus, count, context_lines=24)
    heads, texts = choose_prompts(corpus, 100, context_lines=0), choose_files(corpus)
    greedy, warm = SamplingConfig(), SamplingConfig(temperature=0.8, seed=1)
    pair = (target, draft, tokenizer, prompts)
    bits = {"target": bits_per_byte(target, tokenizer, texts)}
    bits["draft"] = bits_per_byte(draft, tokenizer, texts)
    bits["5-gram, all validation text"] = ngram_bits_per_byte(corpus, tokenizer.vocab_size)
    if other is not None:
        model = load_model(other, device="cpu")
        bits[other.name] = bits_per_byte(model, load_tokenizer(other), texts)
    blocks = TokenBlocks.open(corpus / "validation.bin", 1024)
    return {
        "bits_per_byte": bits | {"files": len(texts), "bytes": len("".join(texts).encode())},
        "greedy": measure_cycles(*pair, greedy, "exact"),
        "temperature_0.8_rejection": measure_cycles(*pair, warm, "rejection"),
        "temperature_0.8_exact": measure_cycles(*pair, warm, "exact"),
        "parsing": count_parsing(target, tokenizer, heads),
        "routing": evaluate(target, blocks, max_blocks=64)["routing"],
    }
