"""For a module of this folder that is run as a file, in a checkout that need not be installed."""

import sys
from pathlib import Path


def run_as_file(*command: str) -> None:
    """Run `draftnorm COMMAND` with the file's arguments; `draftnorm` is found at the root."""
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder is no place for imports
    from draftnorm.scripts.main import main

    sys.exit(main([*command, *sys.argv[1:]]))
