"""What the decode kernels compile to for sm_90, without a GPU: order of the wait, and how many.

A step of a model on the meta device is launched with recorders in place of the kernels, so the
kernels, argument types and constants are exactly those of a real step.
"""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from draftnorm.kernels import (
    cycle,
    decode_attention,
    decode_experts,
    decode_norm,
    head,
    projection,
    rms_norm,
)
from draftnorm.kernels.sample import pack_settings
from draftnorm.model import decode_step
from draftnorm.model.cache import KVCache
from draftnorm.model.config import ModelConfig
from draftnorm.model.transformer import Transformer

pytestmark = pytest.mark.skipif(rms_norm.INTERPRETED, reason="compiles for a GPU")

KERNELS = [
    (projection, "_projection_kernel"),
    (decode_attention, "_decode_attention_kernel"),
    (decode_experts, "_route_kernel"),
    (decode_norm, "_normalize_kernel"),
    (head, "_embed_kernel"),
    (head, "_choose_kernel"),
    (cycle, "_look_up_kernel"),
]
# A one-block prologue everywhere; loops over K, a router and experts.
SMALL = dict(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=2, num_heads=9,
    num_kv_heads=3, head_size=64, tie_embeddings=True,
)  # fmt: skip
LARGE = dict(
    architecture="mixtral", vocab_size=32000, hidden_size=4096, intermediate_size=14336,
    num_layers=2, num_heads=32, num_kv_heads=8, head_size=128, num_experts=8, experts_per_token=2,
    expert_size=14336,
)  # fmt: skip
# Widths that neither has: products of 2,048 outputs and of 3,072.
MEDIUM = dict(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_layers=1, num_heads=32,
    num_kv_heads=8, head_size=64, tie_embeddings=True,
)  # fmt: skip
# What a kernel may read before it waits for its predecessor: weights, which nothing writes, and
# what only kernels before a rotary product write, which lets nothing start before it has waited.
IMMUTABLE = {"weight_ptr", "norm_weight_ptr"}
OLDER = {
    "_decode_attention_kernel": {"position_ptr", "key_ptr", "value_ptr"},
    "argmax": {"position_ptr", "settings_ptr"},  # of the projections
}


@dataclass(frozen=True)
class Launch:
    """One launch, as far as it decides what is compiled."""

    kernel: object
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    warps: int
    source = ASTSource

    def options(self, capability: int) -> dict[str, object]:
        return {"num_warps": self.warps, "launch_pdl": capability >= 90}

    def compiled(self, capability: int):
        types = dict(self.types)
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(self.kernel.arg_names)
            if types[name].startswith("*")
        }
        source = self.source(self.kernel, types, dict(self.constants), aligned)
        target = GPUTarget("cuda", capability, 32)
        return triton.compile(source, target=target, options=self.options(capability))

    def ptx(self) -> str:
        return self.compiled(90).asm["ptx"]


class Recorder:
    def __init__(self, kernel: object, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]):
        return self.record

    def record(self, *arguments: object, num_warps: int = 4, launch_pdl: bool, **named: object):
        values = dict(zip(self.kernel.arg_names, arguments, strict=False)) | named
        types, constants = {}, {}
        for parameter in self.kernel.params:
            name, value = parameter.name, values[parameter.name]
            if parameter.is_constexpr or value is None:
                types[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                names = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}
                names[torch.int64] = "*i64"
                types[name] = names[value.dtype]
            else:
                # Otherwise Triton would compile other code for 1 and for multiples of 16.
                assert parameter.do_not_specialize, f"{self.kernel} specialises {name}={value}"
                types[name] = "fp32" if isinstance(value, float) else "i32"
        launch = Launch(self.kernel, tuple(types.items()), tuple(constants.items()), num_warps)
        self.launches.append(launch)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    recorded: list[Launch] = []
    for module, name in KERNELS:
        monkeypatch.setattr(module, name, Recorder(getattr(module, name), recorded))
    monkeypatch.setattr(decode_step, "INTERPRETED", True)  # let it be built without a GPU
    monkeypatch.setattr(decode_step, "pdl_options", lambda _: {"PDL": True, "launch_pdl": True})
    return recorded


def make_step(config: dict, settings: torch.Tensor | None = None) -> decode_step.DecodeStep:
    model = Transformer(ModelConfig(**config), device="meta", dtype=torch.bfloat16)
    cache = KVCache(model.config, capacity=64, device="meta", dtype=torch.bfloat16)
    return decode_step.DecodeStep(model, cache, rows=64, settings=settings, ngrams=range(1, 9))


@pytest.mark.parametrize("config", [SMALL, LARGE], ids=["small", "large"])
def test_one_kernel_for_each_layer_shape(config: dict, launches: list[Launch]) -> None:
    step, compiled = make_step(config), {}
    for T in range(1, 65):
        for tier in (1, 2, 8, 128):
            launches.clear()
            step.launch(T, tier)
            compiled[T, tier] = frozenset(launches)
    # A tile of 8 rows or of 16, and in attention one split, two at once or many, and of 8 rows long
    # shares or short ones; nothing else about the call matters. Both families have three or four
    # heads a group, so one tile of 8 rows suffices attention up to T = 2.
    attention = {
        tuple(dict(launch.constants)[name] for name in ("R", "ABREAST", "ALONE", "ONCE"))
        for launch in set().union(*compiled.values())
        if launch.kernel.__name__ == "_decode_attention_kernel"
    }
    one_program = {(8, 1, True, False), (8, 2, True, False)}
    many = {(8, 1, False, False), (8, 1, False, True), (16, 1, False, False)}
    assert attention == one_program | many
    assert len(set(compiled.values())) == 5 + 4  # beyond 8 rows no long shares in tiles of 8
    for tier in (1, 2):
        assert compiled[1, tier] == compiled[8, tier] != compiled[9, tier]
    assert compiled[1, 8] == compiled[3, 8] != compiled[1, 128] == compiled[2, 128]
    assert compiled[3, 128] == compiled[8, 128]
    assert compiled[9, 8] != compiled[8, 8] and compiled[9, 128] == compiled[64, 8]
    # embed, qkv, attention, o, gate/up, down, head, choose; normalize, router, route
    assert {len(kernels) for kernels in compiled.values()} == {8 if config is SMALL else 11}


@pytest.mark.parametrize("settings", [None, pack_settings(temperature=0.5)[None]])
@pytest.mark.parametrize("config", [SMALL, LARGE], ids=["small", "large"])
def test_nothing_mutable_is_touched_before_the_wait(config: dict, settings, launches) -> None:
    step = make_step(config, settings)
    for end in cycle.ENDINGS:
        step.launch(1, 2, end)
        step.launch(16, 2, end)
    assert "_look_up_kernel" in {launch.kernel.__name__ for launch in launches}
    early = 0
    for launch in dict.fromkeys(launches):
        kind = dict(launch.constants).get("EPILOGUE", launch.kernel.__name__)
        runtime = [name for name, kind in launch.types if kind != "constexpr"]
        before, *after = launch.ptx().split("griddepcontrol.wait")
        assert len(after) == 1, f"{launch.kernel} waits {len(after)} times"
        assert not re.search(r"\b(st|atom|red)\.(global|release|acq|relaxed)", before)
        if dict(launch.constants).get("EPILOGUE") == "rotary":  # attention comes next: OLDER
            assert "griddepcontrol.launch_dependents" not in before
        origin: dict[str, set[str]] = {}  # register -> the pointer parameters it derives from
        for line in before.splitlines():
            registers = re.findall(r"%r[ds]?\d+|%r\d+", line)
            parameter = re.search(r"ld\.param\S*\s+(%\w+), \[\w+_param_(\d+)\]", line)
            if parameter and int(parameter[2]) < len(runtime):
                origin[parameter[1]] = {runtime[int(parameter[2])]} & {
                    name for name in runtime if name.endswith("_ptr")
                }
            elif "ld.global" in line or "prefetch.global" in line:
                address = re.search(r"\[\s*(%\w+)", line)[1]
                allowed = IMMUTABLE | OLDER.get(kind, set())
                assert origin[address] and origin[address] <= allowed, (launch.kernel, line)
                early += 1
            elif len(registers) > 1:
                origin[registers[0]] = set().union(*(origin.get(r, set()) for r in registers[1:]))
    assert early > 0


def usage(kernel, directory: Path) -> tuple[int, int]:
    """Registers of a thread as compiled, and bytes of its stack."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton has no cuobjdump")
    cubin = directory / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [str(tool), "-res-usage", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])


def innermost_loop(ptx: str) -> str:
    """The smallest stretch from a label to the last jump back to it that has a product in it."""
    loops = []
    for label in re.finditer(r"^(\$L__BB\w+):", ptx, re.MULTILINE):
        jumps = [*re.finditer(rf"\bbra\S*\s+{re.escape(label[1])};", ptx)]
        if jumps and jumps[-1].start() > label.start():
            loops.append(ptx[label.start() : jumps[-1].end()])
    return min((loop for loop in loops if "mma.sync" in loop), key=len)


@pytest.mark.parametrize("rows", [1, 16])
def test_operands_reach_the_matrix_instruction_in_registers(
    rows: int, launches: list[Launch]
) -> None:
    """That rests on Triton's default layouts, whose order of axes changed in 3.7 (operands.py)."""
    make_step(SMALL).launch(rows, 8)
    seen = []
    for launch in dict.fromkeys(launches):
        constants, ptx = dict(launch.constants), launch.ptx()
        if launch.kernel.__name__ == "_projection_kernel":
            assert constants["FIRST"] + constants["SECOND"] >= constants["K"]
            before = ptx[ptx.index("ld.global") : ptx.index("mma.sync")]
            stores = len(re.findall(r"\bst\.shared|\bstmatrix", before))
            if dict(launch.types)["norm_weight_ptr"] == "constexpr":
                assert stores == before.count("bar.sync") == 0
            else:  # one store a thread for the norm's weight in each block of columns, two for rstd
                assert stores <= 1 + (constants["SECOND"] > 0) + 2
            assert "ldmatrix" not in before
            seen.append(constants["EPILOGUE"])
        elif launch.kernel.__name__ == "_decode_attention_kernel":
            loop = innermost_loop(ptx)
            assert loop.count("mma.sync") == ptx.count("mma.sync")
            assert not re.search(r"\bbar\.|\b(st|ld)\.shared|matrix", loop)
            seen.append("attention")
    assert seen == ["rotary", "attention", "residual", "gated", "residual", "argmax"]


@pytest.mark.parametrize("config", [SMALL, MEDIUM, LARGE], ids=["small", "medium", "large"])
def test_attention_keeps_its_sums_in_registers(config, launches, tmp_path: Path) -> None:
    """All of them in tiles of 8 rows; in those of 16 rows of 128 numbers eight words are spilt.

    Of 64 numbers three programs find a place on a multiprocessor, of more two. Long shares, and
    they alone, tell the L2 to evict first.
    """
    step = make_step(config)
    for rows, splits in ((1, 1), (1, 2), (1, 8), (1, 256), (16, 256)):
        launches.clear()
        step.attend(0, rows, splits)
        (launch,) = launches
        registers, stack = usage(launch.compiled(90), tmp_path)
        assert stack <= (32 if config is LARGE and rows == 16 else 0)
        assert registers <= (255 if config is LARGE else 168)
        assert ("evict_first" in launch.ptx()) == ((rows, splits) == (1, 256))


@pytest.mark.parametrize("splits", [1, 2])
def test_so_do_those_of_attention_that_one_program_does(splits: int, launches) -> None:
    """It has no loop: each stretch of code without a jump to it, up to its last product."""
    make_step(SMALL).launch(1, splits)
    (launch,) = (x for x in set(launches) if x.kernel.__name__ == "_decode_attention_kernel")
    stretches = [x for x in re.split(r"^\$L__BB\w+:", launch.ptx(), flags=re.M) if "mma.sync" in x]
    assert stretches
    for stretch in stretches:
        before = stretch[: stretch.rindex("mma.sync")]
        assert not re.search(r"\bbar\.|\b(st|ld)\.shared|matrix", before)


@pytest.mark.parametrize("config", [SMALL, MEDIUM, LARGE], ids=["small", "medium", "large"])
def test_a_step_fits_the_shared_memory_of_an_a100(config: dict, launches, monkeypatch) -> None:
    monkeypatch.setattr(decode_step, "pdl_options", lambda _: {"PDL": False, "launch_pdl": False})
    step = make_step(config)
    step.launch(1, 4, "cycle")
    step.launch(16, 4)
    largest = max(launch.compiled(80).metadata.shared for launch in dict.fromkeys(launches))
    assert 2**12 < largest <= 163 * 1024
