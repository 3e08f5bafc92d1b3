"""What drafting brings: plain decoding beside every drafter × draft length, and transformers.

    draftnorm benchmark speculate --draft draft,ngram --draft-length auto,2,4
    draftnorm benchmark speculate --target DIR --draft ngram -n 128 -r 5

The engines, the clock and the prompts are those of `draftnorm benchmark decode` (greedy; the tokens
must be those of plain decoding).
"""

if __name__ == "__main__":
    from as_file import run_as_file

    run_as_file("benchmark", "speculate")

import argparse

from draftnorm.scripts import options
from draftnorm.scripts.benchmark_decode import add_engine_arguments, run_engines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_arguments(parser)
    parser.add_argument(
        "--draft",
        type=options.several(str),
        metavar="D,D",
        help="drafters (default: ngram, and the embedded draft for the embedded target)",
    )
    parser.add_argument(
        "--draft-length", type=options.draft_lengths, default=["auto"], metavar="N|auto,…"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, and print one table or document."""
    drafts = args.draft or (["ngram"] if args.target else ["draft", "ngram"])
    return run_engines(args, drafts=drafts, lengths=args.draft_length)
