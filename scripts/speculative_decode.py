"""Decode with a drafter and say what it brought: `draftnorm speculate`.

    draftnorm speculate --target DIR --draft ngram --prompt "Rewrite ..." --compare
    draftnorm speculate --target BIG --draft SMALL --draft-length 4 --temperature 0.8 --json

Text streams to stdout as it is committed, numbers go to stderr. `--compare` decodes plainly too:
with `--acceptance exact` the tokens must be the same, whatever the drafter and the draft length.
"""

if __name__ == "__main__":
    from as_file import run_as_file

    run_as_file("speculate")

import argparse
import io
import secrets
import sys
from typing import TYPE_CHECKING, Any

from draftnorm.scripts import options, terminal

# Modules that import torch are imported where they are used: --help and usage errors stay fast.
if TYPE_CHECKING:
    from draftnorm.decoding.generation import Generation
    from draftnorm.decoding.statistics import Result
    from draftnorm.scripts.checkpoints import Loaded


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_run_arguments(parser)
    drafting = parser.add_argument_group("speculation")
    drafting.add_argument(
        "--draft",
        metavar="PATH|NAME|HUB_ID|ngram|none",
        help="default: the embedded draft; ngram with a --target of your own",
    )
    drafting.add_argument(
        "--draft-length", type=options.draft_length, default="auto", metavar="N|auto"
    )
    drafting.add_argument("--acceptance", choices=["exact", "rejection"], default="exact")
    drafting.add_argument(
        "--compare",
        action="store_true",
        help="decode plainly too and compare; on without a prompt of your own",
    )


def run(args: argparse.Namespace) -> int:
    """Decode, report; 0, or 1 if exact speculation changed the tokens on CUDA, or 130."""
    from draftnorm.decoding.generation import generate
    from draftnorm.decoding.sampling import SamplingConfig
    from draftnorm.decoding.speculation import speculate
    from draftnorm.scripts import checkpoints, report

    if args.list:
        checkpoints.list_names()
        return 0
    name = args.target or "target"
    # The embedded draft knows the embedded target's vocabulary, hardly that of a target of yours.
    draft: Loaded | str = args.draft or ("ngram" if args.target else "draft")
    if draft == "none" and args.compare:
        raise ValueError("--compare has nothing to compare plain decoding with: give a --draft")
    own_prompt = args.prompt is not None or args.prompt_file is not None
    prompt = read_prompt(args) if own_prompt else checkpoints.built_in_prompt(name)
    console = terminal.stderr_console(quiet=args.json)
    nowhere = terminal.TextStream(io.StringIO())
    out = nowhere if args.json else terminal.TextStream(sys.stdout)
    seed = args.seed
    if seed is None:
        seed = secrets.randbelow(2**32) if args.temperature > 0 else 0
    chosen = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    settings = {
        "max_new_tokens": args.max_new_tokens,
        "sampling": SamplingConfig(seed=seed, **chosen),
        "stop": tuple(args.stop),
        "ignore_eos": args.ignore_eos,
        "context": args.context,
    }
    request = checkpoints.read_request(name, prompt, args, **settings)
    names = [name] if draft in ("ngram", "none") else [name, draft]
    need = checkpoints.memory_need(names, request, args)
    target = checkpoints.load(name, args, request.tokenizer)
    if draft not in ("ngram", "none"):
        draft = checkpoints.load(draft, args)

    drafting = "" if draft == "none" else f" · draft {getattr(draft, 'name', draft)}"
    console.print(f"{target}{drafting} · {need}", style="dim")
    if out.styled and drafting:
        terminal.show_legend(console)
    if not own_prompt:
        console.print(prompt, style="dim")
    settings["progress"] = terminal.ProgressLine(console)  # whose patience begins after loading
    what = target.model, request.tokenizer, request.prompt_ids
    plain = speculative = None
    if draft == "none":
        plain = decode(generate(*what, **settings), out)
    else:
        generation = speculate(
            *what,
            draft=draft if isinstance(draft, str) else draft.model,
            draft_tokenizer=None if isinstance(draft, str) else draft.tokenizer,
            draft_length=args.draft_length,
            acceptance=args.acceptance,
            **settings,
        )
        speculative = decode(generation, out)
        comparing = args.compare or not own_prompt
        if comparing and speculative.stop_reason != "interrupted":
            console.print("plain decoding of the same prompt, to compare …", style="dim")
            plain = decode(generate(*what, **settings), nowhere)

    document = report.build_document(args, request, target, draft, plain, speculative)
    if args.json:
        print(report.dump(document))
    terminal.show_summary(document, console)
    if "interrupted" in [run.stop_reason for run in (plain, speculative) if run]:
        return 130
    check_exactness(document)
    return 0


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt as text, from wherever the arguments say."""
    try:
        if args.prompt_file is not None:
            prompt = args.prompt_file.read_text(encoding="utf-8")
        else:
            prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    except UnicodeDecodeError as error:
        source = args.prompt_file or "standard input"
        raise ValueError(f"the prompt in {source} is not UTF-8 text: {error.reason}") from None
    if not prompt:
        raise ValueError("the prompt is empty")
    return prompt


def decode(generation: "Generation", out: terminal.TextStream) -> "Result":
    """Decode to the end, or to Ctrl-C; what was committed until then is in the result."""

    def stream() -> None:
        for chunk in generation:
            out.write(chunk.text, chunk.drafted)

    try:
        stream()
    except KeyboardInterrupt:
        generation.close()
        stream()  # what was held back, as the start of a stop string, say
    out.close()
    return generation.result()


def check_exactness(document: dict[str, Any]) -> None:
    """Raise ValueError if exact speculation changed the tokens on CUDA, where it never may.

    On the CPU a genuine near-tie of library products may do it; there the report says so.
    """
    promised = document["acceptance"] == "exact" and document["hardware"]["device"] == "cuda"
    if promised and document["identical"] is False:
        raise ValueError(f"exact speculation changed the tokens: {terminal.verdict(document)}")
