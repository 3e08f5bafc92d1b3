"""RMSNorm against float64: the CPU path, the compiled code without a GPU, the kernels on one.

The Triton interpreter's tests run in a process of their own: tests/test_interpreter.py.
"""

import re
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from triton.compiler import CompiledKernel

from draftnorm.kernels import compilation
from draftnorm.kernels import rms_norm as module
from draftnorm.kernels.rms_norm import (
    CASTING_MODES,
    rms_norm,
    rms_norm_backward,
    rms_norm_forward,
    rms_norm_reference,
)

EPS = 1e-5
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Roundings to the input's dtype, without an offset: the normalised row and the product (llama),
# the product (gemma), rstd, the row and the product (none). An offset adds the factor's rounding.
ROUNDINGS = {"llama": 2, "gemma": 1, "none": 3}


def exact(x: Tensor, weight: Tensor | None, offset: float = 0.0, eps: float = EPS) -> Tensor:
    """The definition in float64, written out apart from the code under test."""
    x = x.double()
    y = x / ((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt()
    return y if weight is None else y * (weight.double() + offset)


def assert_close(y: Tensor, expected: Tensor, roundings: int) -> None:
    """Within `roundings` unit roundoffs of y's dtype, plus 2⁻¹⁹ for the fp32 part: a tree of at
    most 15 additions, rsqrt (2 ulp) and three products err by less than 2⁻²⁴ · 32 together."""
    unit = torch.finfo(y.dtype).eps / 2
    smallest = torch.finfo(y.dtype).smallest_normal * 2 * unit
    bound = expected.abs() * ((1 + unit) ** roundings - 1 + 2**-19) + smallest
    assert y.shape == expected.shape
    assert ((y.double() - expected).abs() <= bound).all()


def tensors(*shape: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * 3
    weight = torch.rand(shape[-1], generator=generator) + 0.5
    return x.to(device, dtype), weight.to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", CASTING_MODES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 64), (577,), (4, 1000)])
def test_cpu_path_matches_float64(shape, mode, dtype):
    x, weight = tensors(*shape, dtype=dtype)
    for w, offset in ((weight, 0.0), (None, 0.0), (weight, 1.0)):
        y = rms_norm(x, w, EPS, offset=offset, casting_mode=mode)
        roundings = ROUNDINGS[mode] + (mode != "gemma" and offset != 0)
        assert y.dtype == dtype
        assert_close(y, exact(x, w, offset), roundings)


def test_casting_modes_round_where_they_say():
    x, weight = tensors(64, 576, dtype=torch.bfloat16)
    normalised = exact(x, None).float()  # float64 → fp32 → bf16 rounds like fp32 except near ties
    llama, gemma = normalised.bfloat16() * weight, (normalised * weight.float()).bfloat16()
    assert (rms_norm(x, weight, EPS) == llama).float().mean() > 0.999
    assert (rms_norm(x, weight, EPS, casting_mode="gemma") == gemma).float().mean() > 0.999
    assert not torch.equal(llama, gemma)


def test_cpu_bits_of_a_row_do_not_depend_on_the_others():
    for dtype in (torch.float32, torch.bfloat16):
        for D in (64, 100, 576, 2048):
            x, weight = tensors(64, D, dtype=dtype)
            alone = torch.cat([rms_norm(row[None], weight, EPS) for row in x])
            for M in (1, 2, 3, 4, 5, 8, 16, 17, 64):
                assert torch.equal(rms_norm(x[:M], weight, EPS), alone[:M])
            if dtype == torch.float32:  # the one-call path has the reference's bits
                assert torch.equal(alone, rms_norm_reference(x, weight, EPS))


def test_cpu_path_is_differentiable():
    x, weight = tensors(3, 7, dtype=torch.float64)
    for mode in CASTING_MODES:
        inputs = (x.clone().requires_grad_(), weight.clone().requires_grad_())
        assert torch.autograd.gradcheck(
            lambda a, w, m=mode: rms_norm(a, w, EPS, casting_mode=m), inputs
        )


def test_inference_mode_where_autograd_records_is_an_error():
    x, weight = tensors(2, 8, dtype=torch.float32)
    for a, w in ((x.clone().requires_grad_(), weight), (x, weight.clone().requires_grad_())):
        with pytest.raises(ValueError, match="autograd records"):
            rms_norm(a, w, EPS, inference_mode=True)
        with torch.no_grad():
            assert not rms_norm(a, w, EPS, inference_mode=True).requires_grad
        assert rms_norm(a, w, EPS).requires_grad
    rms_norm(x, weight, EPS, inference_mode=True)


@pytest.mark.skipif(module.INTERPRETED, reason="the interpreter accepts CPU tensors")
def test_launchers_refuse_cpu_tensors_in_one_line():
    x, weight = tensors(2, 8, dtype=torch.float32)
    for call in (
        lambda: rms_norm_forward(x, weight, EPS),
        lambda: rms_norm_backward(x, x, weight, x[:, 0]),
    ):
        with pytest.raises(ValueError, match=r"^the launchers run Triton kernels[^\n]*$"):
            call()


def test_unknown_casting_mode_is_an_error():
    with pytest.raises(ValueError, match="casting_mode='lama'"):
        rms_norm(torch.ones(1, 4), None, EPS, casting_mode="lama")


def test_integers_are_an_error():
    with pytest.raises(ValueError, match=r"x\.dtype=torch\.int64 not a float"):
        rms_norm(torch.ones(1, 4, dtype=torch.long), None, EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_of_another_size_is_an_error(dtype):
    """Also where PyTorch would broadcast it, as it would a single number."""
    for size in (1, 3, 5):
        with pytest.raises(ValueError, match=r"need a weight \[4\]"):
            rms_norm(torch.ones(2, 4, dtype=dtype), torch.ones(size, dtype=dtype), 1e-5)


def compile_ptx(D: int, *, many_rows: bool, store: bool) -> str:
    """The PTX for sm_90 of the forward kernel that the rule takes, bf16; needs no GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    R, warps = module.launch_shape(D, many_rows, None)
    kernel = module._rms_norm_row_kernel if R == 1 else module._rms_norm_block_kernel
    constants = {"D": D, "OFFSET": 0.0, "MODE": "llama"}
    constants |= {"STORE_RSTD": store, "PDL": True} | ({"R": R} if R > 1 else {})
    constants |= {} if store else {"rstd_ptr": None}
    types = {"y_ptr": "*bf16", "x_ptr": "*bf16", "weight_ptr": "*bf16", "rstd_ptr": "*fp32"}
    types |= {"x_stride": "i32", "M": "i32", "eps": "fp32"}
    signature = {n: "constexpr" if n in constants else types[n] for n in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name == "x_stride"
    }
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": warps}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


@pytest.mark.skipif(module.INTERPRETED, reason="nothing is compiled")
@pytest.mark.parametrize("many_rows", [False, True])
@pytest.mark.parametrize("D", [256, 576, 2048])
def test_inference_mode_compiles_the_store_out(D, many_rows):
    train, inference = (compile_ptx(D, many_rows=many_rows, store=s) for s in (True, False))
    stores = [len(re.findall(r"\bst\.global", ptx)) for ptx in (train, inference)]
    assert stores[0] > stores[1] > 0
    # 16 bytes a thread wherever rows are whole multiples of 16 bytes.
    assert set(re.findall(r"\bst\.global\S*", inference)) == {"st.global.v4.b32"}
    # The wait stands before everything that reads memory; blocks ask for their lines before it.
    assert inference.index("griddepcontrol.wait") < inference.index("ld.global")
    before, behind = inference.split("griddepcontrol.wait")
    assert ("prefetch.global.L2" in before) == (many_rows and D == 256)
    assert "prefetch" not in behind


@pytest.mark.skipif(module.INTERPRETED, reason="nothing is compiled")
def test_a_remembered_kernel_is_launched_as_triton_launches_it(monkeypatch):
    """Triton's own launch of a compiled kernel passes the same, and a profiler's three hooks."""
    launches = []
    compiled = object.__new__(CompiledKernel)
    compiled.module, compiled.function, compiled.packed_metadata = "module", 7, (4, 1, 0)
    compiled.name, compiled.src = "kernel", None
    compiled._run = lambda *args: launches.append(args)
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: 5))
    monkeypatch.setattr(compilation, "driver", driver)
    monkeypatch.setattr(compilation, "_COMPILED", SimpleNamespace(get=lambda key: compiled))
    monkeypatch.setattr(module, "has_pdl", lambda device: True)
    x, weight = tensors(3, 64, dtype=torch.bfloat16)
    for store in (False, True):
        y, rstd_M = module._forward(x, weight, EPS, 0.0, "llama", None, store)
        ours = launches.pop()
        assert ours[9:12] == (y, x, weight)
        assert ours[12] is rstd_M
        compiled[3, 1, 1](*ours[9:], stream=5)
        tritons = launches.pop()
        assert ours[:6] == tritons[:6] == (3, 1, 1, 5, 7, (4, 1, 0))
        assert ours[6:9] == (None, None, None)
        assert len(ours) == len(tritons)


# GPU ---------------------------------------------------------------------------------------------

HIDDEN = (
    1,
    2,
    3,
    7,
    31,
    64,
    100,
    129,
    576,
    1000,
    1024,
    1536,
    2049,
    4096,
    5120,
    16384,
    32767,
    32768,
)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", HIDDEN)
def test_forward_matches_float64(D, dtype):
    x, weight = tensors(19, D, dtype=dtype, device="cuda", seed=D)
    for row_mode in ("row", "block") if D <= 4096 else ("row",):
        y, rstd = rms_norm_forward(x, weight, EPS, row_mode=row_mode)
        assert_close(y, exact(x, weight), ROUNDINGS["llama"])
        expected_rstd = (x.double().square().mean(-1) + EPS).rsqrt()
        torch.testing.assert_close(rstd.double(), expected_rstd, rtol=2**-19, atol=0)
        y_inference, empty = rms_norm_forward(
            x, weight, EPS, row_mode=row_mode, inference_mode=True
        )
        assert empty.numel() == 0
        assert torch.equal(y_inference, y)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", CASTING_MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_modes_offsets_and_missing_weights(mode, dtype):
    x, weight = tensors(5, 3, 576, dtype=dtype, device="cuda")
    for w, offset in ((weight, 0.0), (None, 0.0), (weight, 1.0), (weight.float(), 0.0)):
        y = rms_norm(x, w, EPS, offset=offset, casting_mode=mode)
        assert y.dtype == dtype
        # A wider weight is rounded to the input's dtype first, unless the mode is gemma.
        assert_close(y, exact(x, w, offset), ROUNDINGS[mode] + (mode != "gemma" and offset != 0))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_a_row_do_not_depend_on_the_launch(dtype):
    for D in (100, 576, 2048):
        wide, weight = tensors(4096, D + 8, dtype=dtype, device="cuda")
        weight = weight[:D].contiguous()
        x = wide[:, :D].contiguous()
        expected = rms_norm(x, weight, EPS)  # many rows: the block kernel where it pays
        for M in (*range(1, 18), 31, 32, 33, 64, 144, 272):
            assert torch.equal(rms_norm(x[:M], weight, EPS), expected[:M])
        assert torch.equal(rms_norm(wide[:64, :D], weight, EPS), expected[:64])  # a row stride
        shifted = torch.empty(64 * D + 1, dtype=dtype, device="cuda")[1:].view(64, D)
        shifted.copy_(x[:64])  # not aligned to 16 bytes: other loads, other layouts
        assert torch.equal(rms_norm(shifted, weight, EPS), expected[:64])
        for warps in (1, 2, 4, 8, 16):
            y = torch.empty_like(x[:64])
            options = (D, 0.0, "llama", False, False)
            module._rms_norm_row_kernel[(64,)](
                y, x, weight, None, D, EPS, *options, num_warps=warps
            )
            assert torch.equal(y, expected[:64])


@pytest.mark.gpu
def test_dependent_launches_keep_their_order():
    """Chains of 100 norms in a graph, 100 inputs: bits with early launch equal those without.

    A launch that reads before its predecessor has written sees the previous input's row.
    """
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("programmatic dependent launch needs sm_90")
    inputs = torch.randn(100, 16, 576, device="cuda").bfloat16()
    chains = {}
    for pdl in (False, True):
        buffers = torch.zeros(101, 16, 576, dtype=torch.bfloat16, device="cuda")

        def chain(buffers=buffers, pdl=pdl):
            for x, y in pairwise(buffers):
                options = (576, EPS, 576, 0.0, "llama", False, pdl)
                module._rms_norm_row_kernel[(16,)](
                    y, x, None, None, *options, num_warps=1, launch_pdl=pdl
                )

        chain()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain()
        chains[pdl] = graph, buffers
    for x in inputs:
        for graph, buffers in chains.values():
            buffers[0].copy_(x)
            graph.replay()
        assert torch.equal(chains[False][1], chains[True][1])
        assert chains[True][1].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("M", "D"), [(1, 1), (5, 3), (300, 100), (5000, 576), (33, 4096), (9, 32768)]
)
def test_backward_matches_autograd_of_the_reference_in_float64(M, D, dtype):
    x, weight = tensors(M, D, dtype=dtype, device="cuda")
    dy, _ = tensors(M, D, dtype=dtype, device="cuda", seed=1)
    for mode, offset in (("llama", 0.0), ("gemma", 1.0)):
        leaves = [t.detach().clone().requires_grad_() for t in (x, weight)]
        wide = [t.detach().double().requires_grad_() for t in (x, weight)]
        rms_norm(*leaves, EPS, offset=offset, casting_mode=mode).backward(dy)
        rms_norm_reference(*wide, EPS, offset=offset).backward(dy.double())
        # One rounding to the dtype each; below it fp32 sums of M, or D, random terms. For small D
        # dx is what remains of a cancellation (x̂² → 1), so its scale is that of the terms.
        bound = torch.finfo(dtype).eps / 2 + 2e-6
        factor = weight.double() + offset
        terms = (dy.double() * factor * (x.double().square().mean(-1, True) + EPS).rsqrt()).norm()
        for leaf, expected, scale in zip(leaves, wide, (terms, 0.0), strict=True):
            assert leaf.grad.dtype == dtype
            error = (leaf.grad.double() - expected.grad).norm()
            assert error <= bound * max(expected.grad.norm(), scale)


@pytest.mark.gpu
def test_backward_is_deterministic_and_takes_any_gradient_layout():
    x, weight = tensors(3000, 576, dtype=torch.bfloat16, device="cuda")
    _, rstd = rms_norm_forward(x, weight, EPS)
    dy = torch.ones(1, 1, dtype=x.dtype, device="cuda").expand_as(x)
    first, second = (rms_norm_backward(dy, x, weight, rstd) for _ in range(2))
    dense = rms_norm_backward(dy.contiguous(), x, weight, rstd)
    for a, b, c in zip(first, second, dense, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert rms_norm_backward(dy, x, None, rstd)[1] is None
    with pytest.raises(ValueError, match="rstd"):
        rms_norm_backward(dy, x, weight, rms_norm_forward(x, weight, EPS, inference_mode=True)[1])


@pytest.mark.gpu
def test_strides_shapes_and_what_is_refused():
    wide, weight = tensors(2, 3, 5, 80, dtype=torch.float32, device="cuda")
    weight = weight[:64].contiguous()
    x = wide[..., 8:72]
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    y = rms_norm(x, weight, EPS)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before + 1  # y: x is not copied
    assert_close(y, exact(x, weight), ROUNDINGS["llama"])
    assert rms_norm(x[:0], weight, EPS).shape == (0, 3, 5, 64)
    y = rms_norm(x, weight, 1)  # an integer eps would be compiled in as one
    assert_close(y, exact(x, weight, eps=1.0), ROUNDINGS["llama"])
    for bad, message in (
        (x.transpose(-1, -2), "contiguous"),
        (torch.ones(2, 32769, device="cuda"), "32768"),
        (x.double(), "float64"),
        (x[..., :63], "weight"),
    ):
        with pytest.raises(ValueError, match=message):
            rms_norm(bad, weight, EPS)
    with pytest.raises(ValueError, match="row_mode"):
        rms_norm_forward(x, weight, EPS, row_mode="rows")


@pytest.mark.gpu
def test_inference_allocates_nothing_but_y():
    x, weight = tensors(4096, 64, dtype=torch.bfloat16, device="cuda")

    def requested(call) -> int:
        call()
        before = torch.cuda.memory_stats()["requested_bytes.all.allocated"]
        call()
        return torch.cuda.memory_stats()["requested_bytes.all.allocated"] - before

    y_bytes = x.numel() * x.element_size()
    assert requested(lambda: rms_norm(x, weight, EPS)) == y_bytes
    assert requested(lambda: rms_norm_forward(x, weight, EPS, inference_mode=True)) == y_bytes
    assert requested(lambda: rms_norm_forward(x, weight, EPS)) == y_bytes + 4 * len(x)
    with torch.inference_mode():
        assert requested(lambda: rms_norm(x, weight, EPS)) == y_bytes


@pytest.mark.gpu
def test_row_offsets_beyond_32_bits():
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    M, D = 65_540, 32_768  # the last rows start past 2³¹ elements
    x = torch.empty(M, D, dtype=torch.bfloat16, device="cuda").fill_(1)
    x[-3:], weight = tensors(3, D, dtype=torch.bfloat16, device="cuda")
    assert_close(rms_norm(x, weight, EPS)[-3:], exact(x[-3:], weight), ROUNDINGS["llama"])
