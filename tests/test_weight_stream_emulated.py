"""The weight stream's device code on a CPU: its definition in float64, and that nobody waits for
ever. What needs the machine is in test_weight_stream_gpu.py.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from gluon_emulator import Emulator
from stream_support import (
    PHASES,
    SHAPES,
    Run,
    check_each_phase,
    check_layer,
    check_pieces,
    check_places,
    inputs,
    make_weights,
)

from draftnorm.kernels.rms_norm import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="emulates by itself")
LONG, WIDE, HALF = (replace(shape, device="cpu") for shape in SHAPES.values())


@pytest.fixture
def emulate(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Emulator]:
    return lambda programs: Emulator(monkeypatch, programs)


@pytest.mark.parametrize("M", [5, 9])
def test_each_phase_is_its_definition(emulate, M: int) -> None:
    emulate(3)
    check_each_phase(LONG, make_weights(LONG), M)


@pytest.mark.parametrize("shape,M", [(LONG, 20), (WIDE, 1), (HALF, 9)])
def test_a_layer_is_its_definition(emulate, shape, M: int) -> None:
    emulate(3)
    check_layer(shape, make_weights(shape), M)


def test_keys_and_values_go_where_they_belong_and_nothing_else_is_written(emulate) -> None:
    emulate(2)
    check_places(LONG, make_weights(LONG), 5, 15)


@pytest.mark.parametrize("M", [1, 17])
def test_pieces_of_a_layer_have_the_bits_of_the_whole(emulate, M: int) -> None:
    emulate(2)
    check_pieces(LONG, make_weights(LONG), M)


# Fewer tiles than programs in some phases, and in all but one; one program with all of them.
@pytest.mark.parametrize("programs", [1, 70, 150])
def test_bits_do_not_depend_on_the_programs_and_idle_ones_do_not_hang(emulate, programs) -> None:
    weights = make_weights(WIDE)

    def outputs(programs: int) -> list[torch.Tensor]:
        emulate(programs)
        run = Run(WIDE, weights, *inputs(WIDE, 3)).launch(PHASES["layer"])
        assert run.buffers.counters[1:].tolist() == [programs] * 3
        return run.outputs()

    with pytest.MonkeyPatch.context() as patch:
        Emulator(patch, 4)
        run = Run(WIDE, weights, *inputs(WIDE, 3)).launch(PHASES["layer"])
    for ours, expected in zip(outputs(programs), run.outputs(), strict=True):
        assert torch.equal(ours, expected)
