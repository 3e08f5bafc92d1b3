"""Only for the process that tests/test_interpreter.py starts: there all kernels are interpreted."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.exit("set TRITON_INTERPRET=1 and run tests/interpreter alone", returncode=4)
