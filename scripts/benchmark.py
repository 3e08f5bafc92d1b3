"""Measurements: `draftnorm benchmark norm | decode | speculate | ladder | exactness`."""

if __name__ == "__main__":
    from as_file import run_as_file

    run_as_file("benchmark")

import argparse

from draftnorm.scripts.main import add_commands

BENCHMARKS = {
    "norm": ("benchmark_norm", "time RMSNorm over rows and hidden sizes"),
    "decode": ("benchmark_decode", "time plain decoding, or a GPU's step kernel by kernel"),
    "speculate": ("benchmark_speculate", "time drafters and draft lengths beside plain decoding"),
    "ladder": ("benchmark_ladder", "time a GPU's step with the norm stored, unstored and fused"),
    "exactness": ("benchmark_exactness", "check that a row's bits depend on that row alone"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_commands(parser, BENCHMARKS, parser.remaining)
