"""All that a step launches is compiled ahead, for an sm_90 device that only Triton believes in.

Models live on the meta device and launches go nowhere, but dispatch, compilation and the check of
shared memory are Triton's own.
"""

import itertools
import logging
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from test_decode_compiled import LARGE, SMALL
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from draftnorm.kernels import rms_norm
from draftnorm.kernels.compilation import OutOfResources, compile_kernels
from draftnorm.kernels.cycle import ENDINGS, Text
from draftnorm.kernels.decode_attention import count_splits
from draftnorm.kernels.sample import pack_settings
from draftnorm.model import decode_step, open_step
from draftnorm.model.cache import KVCache
from draftnorm.model.config import ModelConfig
from draftnorm.model.transformer import Transformer

pytestmark = pytest.mark.skipif(rms_norm.INTERPRETED, reason="compiles for a GPU")
QWEN3 = dict(
    architecture="qwen3", vocab_size=2048, hidden_size=1024, intermediate_size=3072, num_layers=1,
    num_heads=16, num_kv_heads=8, head_size=128, qk_norm=True,
)  # fmt: skip
_unused_devices = itertools.count(1000)  # Triton keeps compiled kernels by device


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A driver whose device has the shared memory of an H100; `launches` counts kernels run."""
    device, gpu = next(_unused_devices), SimpleNamespace(shared_memory=232448, launches=0)

    def launcher(source: object, metadata: object):
        def launch(*_: object) -> None:
            gpu.launches += 1

        return launch

    fake = SimpleNamespace(
        get_current_device=lambda: device,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        launcher_cls=launcher,
        utils=SimpleNamespace(
            get_device_properties=lambda _: {"max_shared_mem": gpu.shared_memory},
            load_binary=lambda *_: (object(), 0, 0, 0, 1024),
        ),
    )
    monkeypatch.setattr(driver, "_active", fake)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(decode_step, "INTERPRETED", True)  # let a step be built without a GPU
    monkeypatch.setattr(decode_step, "pdl_options", lambda _: {"PDL": True, "launch_pdl": True})
    return gpu


def make_step(config: dict, settings: torch.Tensor | None = None) -> decode_step.DecodeStep:
    model = Transformer(ModelConfig(**config), device="meta", dtype=torch.bfloat16)
    cache = KVCache(model.config, capacity=64, device="meta", dtype=torch.bfloat16)
    return decode_step.DecodeStep(model, cache, settings=settings)


@pytest.mark.parametrize("sampling", [None, {}, {"top_k": 9}], ids=["greedy", "pure", "filtered"])
@pytest.mark.parametrize("config", [SMALL, LARGE, QWEN3], ids=["small", "large", "qwen3"])
def test_after_compiling_ahead_no_step_compiles(config, sampling, gpu, monkeypatch) -> None:
    settings = None if sampling is None else pack_settings(temperature=0.8, **sampling)[None]
    step, heard = make_step(config, settings), []
    tiers = [count_splits(2**n) for n in range(7, 18)]

    def work() -> None:
        shapes = ((T, end) for end in ENDINGS for T in (1, 2, 16))
        for (T, end), tier in itertools.product(shapes, (*tiers[:3], tiers[-1])):
            step.launch(T, tier, end)

    count = compile_kernels(work, lambda *progress: heard.append(progress))
    assert gpu.launches == 0
    assert heard == [("compiling kernels", n, count) for n in range(1, count + 1)]
    late: list[str] = []
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda *, repr, **_: late.append(repr))
    steps = [(T, end) for end in ENDINGS for T in range(1, 17)]
    for (T, end), tier in itertools.product(steps, tiers):
        step.launch(T, tier, end)
    assert late == []
    assert gpu.launches > 2 * len(steps) * 5
    assert compile_kernels(work) == 0


def test_a_kernel_that_does_not_fit_is_an_error_at_its_first_launch(gpu) -> None:
    gpu.shared_memory = 1024
    step = make_step(SMALL)
    compile_kernels(lambda: step.launch(1, 2))
    with pytest.raises(OutOfResources, match="shared memory"):
        step.launch(1, 2)


@pytest.mark.parametrize(
    ("capability", "dtype", "out_of", "said"),
    [
        ((9, 0), torch.bfloat16, None, None),
        ((7, 5), torch.bfloat16, None, "compute capability 8.0"),
        ((9, 0), torch.float32, None, "not torch.float32"),
        ((8, 6), torch.bfloat16, OutOfResources(200_000, 101_376, "shared memory"), "101376"),
    ],
)
def test_a_gpu_that_cannot_run_the_kernels_is_named_and_gets_the_readable_path(
    capability, dtype, out_of, said, monkeypatch, caplog
) -> None:
    class Step(open_step.ReadableStep):
        def __init__(self, model, cache, *, rows, vocabulary, settings, text, ngrams) -> None:
            super().__init__(model, cache, vocabulary)

        def prepare(self, *_: object) -> None:
            if out_of:
                raise out_of

    monkeypatch.setattr(open_step, "DecodeStep", Step)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    model = SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
    with caplog.at_level(logging.WARNING, "draftnorm"):
        step = open_step.open_step(model, None, [(1, "asked")], lengths=range(1, 2))
    assert isinstance(step, Step) == (said is None)
    assert isinstance(step, open_step.ReadableStep)
    assert ([said in record.getMessage() for record in caplog.records] or [None]) == [said and True]


def test_an_interrupted_capture_leaves_no_graph(monkeypatch) -> None:
    interrupts, state = [None, KeyboardInterrupt, None, None], torch.zeros(1)

    def launch(*_: object) -> None:
        if interrupt := interrupts.pop(0):
            raise interrupt

    text = Text(tokens=state, state=state, blocks=state)
    step = SimpleNamespace(
        graphs={}, inputs=state, choices=state, experts_touched=state, text=text, launch=launch
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", lambda _: nullcontext())
    with pytest.raises(KeyboardInterrupt):
        decode_step.DecodeStep.graph(step, 1, 2, "cycle")
    graph = decode_step.DecodeStep.graph(step, 1, 2, "cycle")
    assert interrupts == []  # captured anew
    assert decode_step.DecodeStep.graph(step, 1, 2, "cycle") is graph
