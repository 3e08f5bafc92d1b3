"""Measurements: `draftnorm benchmark norm | decode | ladder`, each a module of its own."""

if __name__ == "__main__":  # run as a file, also uninstalled: the command, from the checkout's root
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from draftnorm.scripts.main import main

    sys.exit(main(["benchmark", *sys.argv[1:]]))

import argparse

from draftnorm.scripts.main import add_commands

BENCHMARKS = {
    "norm": ("benchmark_norm", "time RMSNorm over rows and hidden sizes"),
    "decode": ("benchmark_decode", "time plain and speculative decoding beside transformers"),
    "ladder": ("benchmark_ladder", "time a GPU decode step of a real shape, kernel by kernel"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_commands(parser, BENCHMARKS, parser.remaining)
