"""python sanitized.py PART: kernels at work, small, for compute-sanitizer to look at."""

import sys
from pathlib import Path

import torch
from families import BASE, FAMILIES
from stream_support import PHASES, SHAPES, Run, make_weights, random
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from draftnorm import SamplingConfig, load_model, speculate
from draftnorm.kernels.decode_attention import (
    AttentionWorkspace,
    count_splits,
    decode_attention,
    workspace_sizes,
)
from draftnorm.kernels.residual_rms_norm import residual_rms_norm
from draftnorm.kernels.rms_norm import rms_norm
from draftnorm.model.cache import KVCache
from draftnorm.model.config import ModelConfig
from draftnorm.model.decode_step import DecodeStep
from draftnorm.model.transformer import Transformer

EMBEDDED = Path(__file__).parent.parent / "model/embedded"
GPU = dict(device="cuda", dtype=torch.bfloat16)


def norms() -> None:
    for D in (64, 576, 3072):
        x, residual, weight = (torch.randn(M, D, **GPU) for M in (300, 300, 1))
        x, weight = x.requires_grad_(), weight[0].clone().requires_grad_()
        rms_norm(x, weight, 1e-5).sum().backward()
        residual_rms_norm(x, residual, weight, 1e-5)[0].sum().backward()
        with torch.inference_mode():
            for rows in (1, 300):
                rms_norm(x[:rows], weight, 1e-5, inference_mode=True)
                residual_rms_norm(x[:rows], residual[:rows], weight, 1e-5, inference_mode=True)


def steps() -> None:
    """Prefill and steps of every family: all kernels of a layer that is not streamed."""
    sizes = dict(hidden_size=48, head_size=8, intermediate_size=56)  # the library's own want eights
    for family in FAMILIES.values():
        if "expert_size" in family:
            family = family | dict(expert_size=24)
        config = ModelConfig(**BASE | family | sizes)
        model = Transformer(config, **GPU).init_weights(seed=1)
        cache = KVCache(config, capacity=64, **GPU)
        step = DecodeStep(model, cache, rows=16)
        model.prefill(list(range(20)), cache)
        for T in (1, 5, 9):
            step.forward([list(range(T))])
            assert len(step.chosen) == T


def attention() -> None:
    """One split, two at once, and many."""
    for H, G, K in ((32, 8, 128), (9, 3, 64)):
        for rows, length in ((1, 100), (1, 200), (5, 200), (5, 1500), (1, 3000)):
            keys, values = (torch.randn(1, G, 3072, K, **GPU) for _ in range(2))
            q = torch.randn(rows, H, K, **GPU)
            positions = torch.arange(length, length + rows, device="cuda", dtype=torch.int32)
            splits = count_splits(length + rows)
            acc, extremes, tickets = workspace_sizes(1, rows, H, G, K, splits)
            workspace = AttentionWorkspace(
                acc=torch.zeros(acc, device="cuda"),
                extremes=torch.zeros(extremes, device="cuda"),
                tickets=torch.zeros(tickets, device="cuda", dtype=torch.int32),
            )
            for _ in range(2):
                decode_attention(
                    torch.zeros_like(q), q, keys, values, positions, rows=rows, splits=splits,
                    workspace=workspace, pdl={"PDL": True, "launch_pdl": True}, eager=True,
                )  # fmt: skip


def cycles() -> None:
    """Both drafters, each way to choose."""
    target, draft = (load_model(EMBEDDED / name, device="cuda") for name in ("target", "draft"))
    for drafter, sampling in (
        (draft, dict()),
        (draft, dict(temperature=0.8)),
        ("ngram", dict(temperature=0.8, top_p=0.9)),
    ):
        speculate(
            target, None, [5, 6, 7] * 20, draft=drafter, draft_length=3, max_new_tokens=12,
            ignore_eos=True, sampling=SamplingConfig(seed=1, **sampling),
        ).result()  # fmt: skip


def stream() -> None:
    shape = SHAPES["wide"]
    weights, widths = make_weights(shape), (shape.D, shape.H * shape.K, shape.F)
    for M in (3, 9):
        inputs = [random(M, width, seed=i, **GPU) for i, width in enumerate(widths)]
        Run(shape, weights, *inputs).launch(PHASES["layer"])


@gluon.jit
def _waits(barrier):
    mbarrier.wait(barrier, 0)


@gluon.jit
def _arrives(barrier):
    mbarrier.arrive(barrier, count=1)


@gluon.jit
def _parts_kernel():
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier, count=1)
    gl.warp_specialize([(_waits, (barrier,)), (_arrives, (barrier,))], [4], [64])


def parts() -> None:
    """A kernel whose two parts share nothing but one barrier."""
    _parts_kernel[(8,)](num_warps=4)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    torch.cuda.synchronize()
    print("done")
