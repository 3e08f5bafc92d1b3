"""Decode plainly: `draftnorm generate`. The same as `speculate --draft none`.

draftnorm generate --target DIR --prompt "Why is the sky blue?" --temperature 0.7
echo "Once upon a time" | draftnorm generate --target DIR --raw --prompt - --json
"""

if __name__ == "__main__":
    from as_file import run_as_file

    run_as_file("generate")

import argparse

from draftnorm.scripts import options, speculative_decode


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_run_arguments(parser)
    parser.set_defaults(draft="none", draft_length="auto", acceptance="exact", compare=False)


def run(args: argparse.Namespace) -> int:
    return speculative_decode.run(args)
