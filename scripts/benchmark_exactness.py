"""Contract 3 on this machine: `draftnorm benchmark exactness`; exit code 1 if any bit differs.

    draftnorm benchmark exactness                        # the embedded pair
    draftnorm benchmark exactness --target DIR --draft DIR
    draftnorm benchmark exactness --shape mixtral-8x7b   # random weights of this shape, on a GPU

Four levels, each compared bit for bit. *op*: the result of every kernel of a step (a GPU's own; a
CPU has library products in tiles of one shape), for M rows at once and one by one, norms, rotary
and experts included. *model*: the logits of a verify of T rows and of T single steps, behind a
prompt that ends before a border of attention's splits. *cache*: keys and values by position after
those, and after cycles that drafted wrongly and rolled back. *tokens*: speculation and plain
decoding, for every drafter × draft length.

Shapes: B sequences, T tokens, M rows of a step, V vocabulary.
"""

if __name__ == "__main__":
    from as_file import run_as_file

    run_as_file("benchmark", "exactness")

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from draftnorm.decoding.generation import generate
from draftnorm.decoding.sampling import SamplingConfig
from draftnorm.decoding.speculation import speculate
from draftnorm.kernels.rms_norm import INTERPRETED
from draftnorm.model.cache import KVCache
from draftnorm.model.decode_step import DecodeStep
from draftnorm.model.open_step import open_step
from draftnorm.model.transformer import Transformer
from draftnorm.scripts import benchmark_report, checkpoints, options, timing
from draftnorm.scripts.benchmark_decode import benchmark_prompt
from draftnorm.scripts.benchmark_report import progress, table
from draftnorm.scripts.shapes import NAMES, random_model, scattered_tokens
from draftnorm.scripts.step_times import Launch, observe_step

SCHEMA = "draftnorm/benchmark-exactness/1"
LADDER = (*range(1, 18), 31, 32, 33, 64, 144)
PROMPTS = (9, 200)  # tokens of a prompt
TEMPERATURES = (0.0, 0.8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", metavar="PATH|NAME|HUB_ID", help="default: the embedded target")
    parser.add_argument("--draft", metavar="PATH|NAME|HUB_ID", help="a drafter beside the others")
    parser.add_argument("--shape", choices=NAMES, help="random weights of this shape, on a GPU")
    parser.add_argument("--rows", type=options.positive_ints, default=[2, 5, 8, 16, 17, 33],
                        metavar="T,T", help="rows of a verify")  # fmt: skip
    parser.add_argument("--draft-length", type=options.draft_lengths, default=[1, 4, 7, 15, "auto"],
                        metavar="N|auto,…")  # fmt: skip
    parser.add_argument("-p", dest="prompt_tokens", type=options.positive_int, default=440)
    parser.add_argument("--steps", type=options.positive_int, default=256, help="single steps")
    parser.add_argument("-n", dest="new_tokens", type=options.positive_int, default=64)
    options.add_benchmark_arguments(parser)
    options.add_device_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Climb the ladder and print what was compared; 1 if anything differs."""
    model, draft, tokens_T = _subject(args)
    kernels = model.device.type == "cuda" or INTERPRETED
    results = []
    for row in itertools.chain(
        op_level(model, tokens_T, args.prompt_tokens) if kernels else (),
        model_and_cache_levels(model, tokens_T, args.prompt_tokens, args.steps, args.rows),
        token_level(model, draft, tokens_T.tolist(), args.draft_length, args.new_tokens),
    ):
        results.append(row)
        progress(_cells(row))
    document = {
        **benchmark_report.describe(SCHEMA, args, model.device),
        "model": args.shape or args.target or "target",
        "dtype": checkpoints.dtype_name(model.dtype),
        "equal": all(row["compared"] == row["equal"] for row in results),
        "results": results,
    }
    timing.synchronize()  # a kernel's fault would show here, not after the verdict
    benchmark_report.show(document, args, markdown)
    if not document["equal"]:
        print("draftnorm: bits differ, see the table", file=sys.stderr)
    return 0 if document["equal"] else 1


def _subject(args: argparse.Namespace) -> tuple[Transformer, Transformer | None, Tensor]:
    """The model, a drafter if there is one, and text to feed it."""
    room = args.prompt_tokens + args.steps
    if args.shape:
        if args.target or args.draft or args.device == "cpu":
            raise ValueError("--shape takes no --target or --draft, and runs on a GPU alone")
        model = random_model(args.shape, checkpoints.dtype_of(args))
        return model, None, scattered_tokens(model, room)
    target = checkpoints.load(args.target or "target", args)
    name = args.draft or (None if args.target else "draft")
    draft = name and checkpoints.load(name, args).model
    if room > target.model.config.context:
        raise ValueError(
            f"-p and --steps make {room} tokens, the context is {target.model.config.context}"
        )
    tokens = benchmark_prompt(target, room)
    return target.model, draft, torch.tensor(tokens, device=target.model.device)


def op_level(model: Transformer, tokens_T: Tensor, prompt: int) -> Iterator[dict[str, Any]]:
    """Every kernel of a step of M rows, and of M steps of one: each row of its result."""
    most = min(max(LADDER), len(tokens_T) - prompt)
    cache = model.new_cache(prompt + most)
    step = DecodeStep(model, cache, rows=most)
    step.prepare([(M, "asked") for M in sorted({1, most})], range(prompt, prompt + 1))
    model.prefill(tokens_T[:prompt], cache)

    def results(first: int, M: int) -> list[tuple[str, Tensor]]:
        found: list[tuple[str, Tensor]] = []

        def observe(launch: Launch) -> None:
            launch.call()
            timing.synchronize()  # kernels write tokens to host memory: copying those does not wait
            # An expert's rows lie elsewhere when there are others; the next product sums them.
            if launch.kind not in ("route_rows", "mlp.experts.gate_up_proj"):
                found.append((launch.kind, launch.out[:M].reshape(M, -1).clone()))

        cache.lengths[0] = prompt + first  # back or forth: the cache has been there
        step.forward(tokens_T[None, prompt + first : prompt + first + M])
        observe_step(step, M, observe)
        return found

    singles = [results(first, 1) for first in range(most)]
    alone = [torch.cat([out for _, out in calls]) for calls in zip(*singles, strict=True)]
    counts: dict[str, list[int]] = {}
    for M in filter(most.__ge__, LADDER):
        for first in sorted({0, most - M}):
            for (kind, out), expected in zip(results(first, M), alone, strict=True):
                count = counts.setdefault(kind, [0, 0])
                count[0] += M
                count[1] += int((out == expected[first : first + M]).all(dim=1).sum())
    for kind, count in counts.items():
        yield _row("op", kind, "rows × calls", *count)


def model_and_cache_levels(
    model: Transformer, tokens_T: Tensor, prompt: int, steps: int, rows: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Verifies of T rows beside single steps: their logits, and the cache that they leave."""
    end, room = prompt + steps, prompt + steps + max(rows)
    cache = model.new_cache(room)
    asked = [(T, "asked") for T in sorted({1, *rows})]
    decode = open_step(model, cache, asked, lengths=range(prompt, room + 1)).forward
    model.prefill(tokens_T[:prompt], cache)
    alone = torch.cat([decode(tokens_T[None, t : t + 1])[0].clone() for t in range(prompt, end)])
    kept = _new_positions(cache, prompt, end)
    for T in rows:
        _forget(cache, prompt)
        whole, equal = range(prompt, end - T + 1, T), 0
        for t in whole:
            same = decode(tokens_T[None, t : t + T])[0] == alone[t - prompt : t - prompt + T]
            equal += int(same.all(dim=-1).sum())
        yield _row("model", f"verify of {T}", "rows", len(whole) * T, equal)
        yield _cache_row(f"verify of {T}", cache, kept, prompt, prompt + len(whole) * T)
    # Cycles as speculation has them: wrong drafts behind the right token, then a length set back.
    T, equal = max(rows), 0
    _forget(cache, prompt)
    for t in range(prompt, end):
        drafts_T = (tokens_T[t].repeat(T) + torch.arange(T, device=model.device)) % len(alone[0])
        equal += int((decode(drafts_T[None])[0, 0] == alone[t - prompt]).all())
        cache.rollback(t + 1)
    yield _row("model", f"first of {T}, the others wrong", "rows", steps, equal)
    yield _cache_row(f"{T - 1} wrong drafts a cycle", cache, kept, prompt, end)


def _forget(cache: KVCache, length: int) -> None:
    """Roll back, and poison what was there: nobody may read it, everybody must write it again."""
    cache.rollback(length)
    for layer in cache.keys + cache.values:
        layer[0, :, length:] = float("nan")


def _new_positions(cache: KVCache, start: int, end: int) -> list[Tensor]:
    return [layer[0, :, start:end].clone() for layer in cache.keys + cache.values]


def _cache_row(
    what: str, cache: KVCache, kept: list[Tensor], start: int, end: int
) -> dict[str, Any]:
    equal = sum(
        int((layer == expected[:, : end - start]).all(dim=-1).all(dim=0).sum())
        for layer, expected in zip(_new_positions(cache, start, end), kept, strict=True)
    )
    return _row("cache", what, "positions, keys and values", (end - start) * len(kept), equal)


class _RandomDrafter:
    """Proposes tokens that have nothing to do with the text: nearly all are rejected."""

    needs_features = False

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary, self.seen = vocabulary, 0

    def prefill(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        self.seen = len(tokens)

    def catch_up(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        self.seen += len(tokens)

    def propose(self, length: int) -> tuple[list[int], None]:
        return [(self.seen + i) * 7919 % self.vocabulary for i in range(length)], None


def token_level(
    model: Transformer, draft: Transformer | None, tokens: list[int],
    lengths: Sequence[int | str], new_tokens: int,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Speculation with every drafter and draft length beside plain decoding."""
    drafters: dict[str, Any] = {
        "n-grams": "ngram",
        "itself": model,
        "random tokens": _RandomDrafter(model.config.vocab_size),
    }
    if draft is not None:
        drafters["draft"] = draft
    plain = {}
    for prompt, temperature in itertools.product(PROMPTS, TEMPERATURES):
        settings = dict(
            max_new_tokens=new_tokens,
            ignore_eos=True,
            sampling=SamplingConfig(temperature=temperature, seed=prompt),
        )
        result = generate(model, None, tokens[:prompt], **settings).result()
        plain[prompt, temperature] = settings, result.token_ids
    for (name, drafter), length in itertools.product(drafters.items(), lengths):
        equal = 0
        for (prompt, _), (settings, expected) in plain.items():
            found = speculate(
                model, None, tokens[:prompt], draft=drafter, draft_length=length, **settings
            ).result()
            equal += sum(a == b for a, b in zip(found.token_ids, expected, strict=True))
        yield _row(
            "tokens", f"drafts by {name}, {length}", "tokens", len(plain) * new_tokens, equal
        )


def markdown(document: dict[str, Any]) -> str:
    """A table that can be pasted."""
    verdict = "every bit is equal" if document["equal"] else "**BITS DIFFER**"
    rows = table("level | what | of | compared | equal", map(_cells, document["results"]))
    return f"{document['model']}, {document['dtype']}: {verdict}.\n\n{rows}"


def _cells(row: dict[str, Any]) -> str:
    mark = "" if row["equal"] == row["compared"] else "**"
    compared = f"{row['compared']:,} | {mark}{row['equal']:,}{mark}"
    return f"{row['level']} | {row['what']} | {row['of']} | {compared}"


def _row(level: str, what: str, of: str, compared: int, equal: int) -> dict[str, Any]:
    return {"level": level, "what": what, "of": of, "compared": compared, "equal": equal}
