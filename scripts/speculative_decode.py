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
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftnorm.scripts import options, terminal

if TYPE_CHECKING:
    from draftnorm.decoding.generation import Generation
    from draftnorm.decoding.request import Request
    from draftnorm.decoding.statistics import Result
    from draftnorm.model.memory import MemoryNeed
    from draftnorm.scripts.report import Loaded


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
    if args.list:
        return list_built_in()
    prompt = options.read_prompt(args)
    sampling = options.sampling_config(args)
    # The embedded draft knows the embedded target's vocabulary, hardly that of a target of yours.
    draft: Loaded | str = args.draft or ("ngram" if args.target else "draft")
    if draft == "none" and args.compare:
        raise ValueError("--compare has nothing to compare plain decoding with: give a --draft")
    name = args.target or "target"
    request = read_request(options.resolve_checkpoint(name), prompt, args)
    need = memory_need([name] if draft in ("ngram", "none") else [name, draft], request, args)
    target = options.load(name, args, request.tokenizer)
    if draft not in ("ngram", "none"):
        draft = options.load(draft, args)
    own_prompt = args.prompt is not None or args.prompt_file is not None

    from draftnorm.decoding.generation import generate
    from draftnorm.decoding.speculation import speculate
    from draftnorm.scripts import report

    out = None if args.json else terminal.TextStream()
    console = terminal.stderr_console()
    if out is not None:
        console.print(f"{_headline(target, draft)} · {need}", style="dim")
        if out.styled and draft != "none":
            terminal.show_legend(console)
        if not own_prompt:
            terminal.show_prompt(prompt, console)
    what = target.model, request.tokenizer, request.prompt_ids
    settings = {
        "max_new_tokens": args.max_new_tokens,
        "sampling": sampling,
        "stop": tuple(args.stop),
        "ignore_eos": args.ignore_eos,
        "context": args.context,
        "progress": None if args.json else terminal.ProgressLine(console),
    }
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
            if out is not None:
                console.print("plain decoding of the same prompt, to compare …", style="dim")
            plain = decode(generate(*what, **settings), None)

    document = report.build_document(
        command=args.command_line,
        target=target,
        draft=draft,
        sampling=sampling,
        draft_length=args.draft_length,
        acceptance=args.acceptance,
        plain=plain,
        speculative=speculative,
        prompt_ids=request.prompt_ids,
    )
    if args.json:
        print(report.dump(document))
    else:
        terminal.show_summary(document, console)
    if "interrupted" in [run.stop_reason for run in (plain, speculative) if run]:
        return 130
    check_exactness(document)
    return 0


def check_exactness(document: dict[str, Any]) -> None:
    """Raise ValueError if exact speculation changed the tokens on CUDA, where it never may.

    On the CPU a genuine near-tie of library products may do it; there the report says so.
    """
    promised = document["acceptance"] == "exact" and document["hardware"]["device"] == "cuda"
    if promised and document["identical"] is False:
        raise ValueError(f"exact speculation changed the tokens: {terminal.verdict(document)}")


def list_built_in() -> int:
    """Print the names that --target and --draft take without a path."""
    for name in options.EMBEDDED:
        print(f"{name:14} embedded")
    for name in options.FETCHABLE:
        folder = options.FETCHED_FOLDER / name
        print(f"{name:14} {folder if folder.is_dir() else f'run `draftnorm fetch {name}`'}")
    print(f"{'ngram':14} drafts the longest suffix match of prompt and output (--draft only)")
    return 0


def read_request(path: Path, prompt: str, args: argparse.Namespace) -> "Request":
    """The prompt as ids and what may follow it, by a checkpoint whose weights are not read yet."""
    from draftnorm.decoding.request import Request
    from draftnorm.model.config import ModelConfig
    from draftnorm.model.tokenizer import load_tokenizer

    return Request.of(
        ModelConfig.from_directory(path),
        load_tokenizer(path),
        prompt,
        chat=not args.raw,
        system=args.system,
        max_new_tokens=args.max_new_tokens,
        context=args.context,
    )


def memory_need(names: Sequence[str], request: "Request", args: argparse.Namespace) -> "MemoryNeed":
    """What these checkpoints take together; ValueError if a GPU has less. The CPU can swap."""
    from draftnorm.decoding.draft_length import MAX_DRAFT_LENGTH
    from draftnorm.model.checkpoint import resolve_placement
    from draftnorm.model.config import ModelConfig
    from draftnorm.model.memory import MemoryNeed

    device, dtype = resolve_placement(args.device, options.torch_dtype(args.dtype))
    configs = [ModelConfig.from_directory(options.resolve_checkpoint(name)) for name in names]
    need = MemoryNeed.of(configs, request.longest + MAX_DRAFT_LENGTH, device, dtype)
    if device.type == "cuda":
        need.check()
    return need


def decode(generation: "Generation", out: terminal.TextStream | None) -> "Result":
    """Decode to the end, or to Ctrl-C; what was committed until then is in the result."""
    try:
        _stream(generation, out)
    except KeyboardInterrupt:
        generation.close()
        _stream(generation, out)  # what was held back, as the start of a stop string, say
    if out is not None:
        out.close()
    return generation.result()


def _stream(generation: "Generation", out: terminal.TextStream | None) -> None:
    for chunk in generation:
        if out is not None:
            out.write(chunk.text, chunk.drafted)


def _headline(target: "Loaded", draft: "Loaded | str") -> str:
    model, parameters = target.model, target.model.config.parameters
    drafter = draft if isinstance(draft, str) else draft.name
    device = f"{model.device.type}, {str(model.dtype).removeprefix('torch.')}"
    with_draft = "" if drafter == "none" else f" · draft {drafter}"
    return f"{target.name} · {parameters / 1e6:,.0f} M parameters · {device}{with_draft}"
