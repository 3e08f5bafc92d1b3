"""What the tests of the weight stream share, on Hopper and emulated on a CPU: rows through phases
of a layer in marked memory, and each phase's definition in float64 with a bound on its roundings.

Legend: M rows, K inputs, N outputs, F feed-forward width, D hidden size, H query heads, G key/value
heads, S cache slots, B sequences, T rows of each.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from draftnorm.kernels.projection import Rotary
from draftnorm.kernels.rms_norm import rms_norm_forward
from draftnorm.kernels.weight_stream import (
    COUNTERS,
    StreamBuffers,
    StreamWeights,
    stream_layer,
    stream_layer_reference,
)

BF16, FP16 = torch.bfloat16, torch.float16
EPS = 1e-5
UNTOUCHED = 7.0
SEQUENCES, CAPACITY, CONTEXT = 3, 64, 500  # of a cache, and positions that rotary has
ALL_ROWS = 64


@dataclass(frozen=True)
class Shape:
    D: int
    F: int
    H: int
    G: int
    K: int
    dtype: torch.dtype = BF16
    device: str = "cuda"


SHAPES = {
    # More rows of `down` than its ring holds: fetched again for each tile.
    "long": Shape(1024, 5120, 16, 4, 64),
    # Attention wider than the residual stream, and one key/value head.
    "wide": Shape(1024, 2048, 16, 1, 128),
    # The ring holds 8 rows of `down`, not 16; fp16; no grouping.
    "half": Shape(2048, 3072, 16, 16, 128, FP16),
}
O_PROJ, MLP, QKV = ("o",), ("norm", "gate_up", "down"), ("next_norm", "qkv")
PHASES = {
    "o": O_PROJ, "gate_up": MLP[:2], "down": MLP[2:], "qkv": QKV, "layer": O_PROJ + MLP + QKV,
}  # fmt: skip


def random(*shape: int, seed: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def make_weights(shape: Shape) -> StreamWeights:
    D, F, H, G, K = shape.D, shape.F, shape.H, shape.G, shape.K

    def weight(seed: int, N: int, inputs: int) -> Tensor:
        return random(N, inputs, seed=seed, device=shape.device).mul(inputs**-0.5).to(shape.dtype)

    def norm(seed: int) -> tuple[Tensor, float]:
        return random(D, seed=seed, device=shape.device).mul(0.2).add(1).to(shape.dtype), EPS

    return StreamWeights(
        o=weight(1, D, H * K), norm=norm(2), gate_up=weight(3, 2 * F, D), down=weight(4, D, F),
        next_norm=norm(5), qkv=weight(6, (H + 2 * G) * K, D),
    )  # fmt: skip


def sums_of_squares(x: Tensor) -> Tensor:
    """Of each 16 columns, neighbours first, as `rms_norm` sums."""
    sums = x.float().square()
    for _ in range(4):
        sums = sums[:, 0::2] + sums[:, 1::2]
    return sums


def normalized(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """By the kernel `rms_norm`, or with its bits."""
    if x.is_cuda:
        return rms_norm_forward(x, weight, eps, inference_mode=True)[0]
    sums = sums_of_squares(x)
    sums = torch.nn.functional.pad(sums, (0, -sums.shape[1] % 256))
    while sums.shape[1] > 1:
        sums = sums[:, 0::2] + sums[:, 1::2]
    rstd = torch.rsqrt((sums.double() / x.shape[1] + torch.tensor(eps).double()).float())
    return ((x.float() * rstd).to(x.dtype).float() * weight.float()).to(x.dtype)


class Run:
    """Rows of x and of attention's result through some phases, all other memory marked."""

    def __init__(self, shape: Shape, weights: StreamWeights, x: Tensor, attended: Tensor,
                 gated: Tensor, *, T: int = 1, places: Tensor | None = None,
                 pdl: bool = True) -> None:  # fmt: skip
        M, (D, F, H, G, K) = len(x), (shape.D, shape.F, shape.H, shape.G, shape.K)
        self.weights, self.rows, self.T = weights, M, T
        self.pdl = {"PDL": pdl, "launch_pdl": pdl}
        room = -(-M // 16) * 16

        def marked(*sizes: int, dtype: torch.dtype = shape.dtype) -> Tensor:
            return torch.full((room, *sizes), UNTOUCHED, dtype=dtype, device=shape.device)

        self.buffers = StreamBuffers(
            x=marked(D), squares=marked(D // 16, dtype=torch.float32), normed=marked(D),
            gated=marked(F), attended=marked(H * K), q=marked(H, K),
            counters=torch.zeros(COUNTERS, dtype=torch.int64, device=shape.device),
        )  # fmt: skip
        self.buffers.x[:M], self.buffers.attended[:M] = x, attended
        self.buffers.gated[:M] = gated
        self.buffers.squares[:M] = sums_of_squares(x)
        places = torch.arange(M) if places is None else places
        places = places.to(shape.device)
        angles = random(CONTEXT, K // 2, seed=9, device=shape.device)
        B = max(-(-M // T), SEQUENCES)
        size = (2, B, G, max(CAPACITY, M), K)
        cache = torch.full(size, UNTOUCHED, dtype=shape.dtype, device=shape.device)
        self.rotary = Rotary(
            cos=angles.cos(), sin=angles.sin(), positions_M=(places * 7 % CONTEXT).int(),
            slots_M=places.int(), rows_per_sequence=T, keys=cache[0], values=cache[1],
        )  # fmt: skip

    def launch(self, phases: tuple[str, ...], *, fused: bool = True) -> "Run":
        chosen = StreamWeights(**{name: getattr(self.weights, name) for name in phases})
        stream_layer(
            chosen, self.buffers, rows=self.rows, rotary=self.rotary, fused=fused, pdl=self.pdl
        )
        return self

    def kv(self) -> Tensor:
        """What each row has put into the cache, [2, M, G, K]."""
        sequence = torch.arange(self.rows, device=self.rotary.slots_M.device) // self.T
        slots = self.rotary.slots_M.long()
        caches = torch.stack([self.rotary.keys, self.rotary.values])
        return caches[:, sequence, :, slots].transpose(0, 1)

    def outputs(self) -> list[Tensor]:
        """Per row: x, its sums of squares, gated, q, and keys and values."""
        buffers, M = self.buffers, self.rows
        wholes = buffers.x, buffers.squares, buffers.gated, buffers.q
        return [*(whole[:M] for whole in wholes), *self.kv()]


def inputs(shape: Shape, M: int) -> tuple[Tensor, Tensor, Tensor]:
    widths = shape.D, shape.H * shape.K, shape.F
    return tuple(
        random(ALL_ROWS, width, seed=20 + width, device=shape.device, dtype=shape.dtype)[:M]
        for width in widths
    )


def rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def product(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x Wᵀ in float64, and how far fp32 sums in the kernel's order may lie from it.

    A sum of K products is K / 256 instructions on each of 16 accumulators, in each 16 products, and
    then 5 additions; tensor cores cut where others round, so each may be off by 2⁻²³.
    """
    x, weight = x.double(), weight.double()
    depth = x.shape[1] / 256 + 16 + 5
    return x @ weight.T, depth * 2**-23 * (x.abs() @ weight.abs().T)


def assert_within(actual: Tensor, expected: Tensor, error: Tensor) -> None:
    """Up to `error` off before a last operation in fp32, then rounded to its dtype.

    2⁻²⁵ is half of fp16's least number.
    """
    bound = error + (rounding(actual.dtype) + 2**-24) * (expected.abs() + error) + 2**-25
    assert actual.shape == expected.shape
    assert ((actual.double() - expected).abs() <= bound).all()


def check_each_phase(shape: Shape, weights: StreamWeights, M: int) -> None:
    H, G, K = shape.H, shape.G, shape.K
    x, attended, gated = inputs(shape, M)

    def run(phases: str) -> Run:
        return Run(shape, weights, x, attended, gated).launch(PHASES[phases])

    for phase, rows, weight in (("o", attended, weights.o), ("down", gated, weights.down)):
        buffers = run(phase).buffers
        expected, error = product(rows, weight)
        assert_within(buffers.x[:M], x.double() + expected, error)
        exact = buffers.x[:M].double().square().view(M, -1, 16).sum(-1)
        assert ((buffers.squares[:M] - exact).abs() <= 16 * 2**-24 * exact).all()

    normed = normalized(x, *weights.norm)
    both, errors = product(normed, weights.gate_up)
    (gate, up), (gate_error, up_error) = both.chunk(2, 1), errors.chunk(2, 1)
    # silu is at most 1.1 times as steep as its argument; exp and division: some 2⁻²¹.
    error = 1.1 * gate_error * (up.abs() + up_error) + silu(gate).abs() * up_error
    expected = silu(gate) * up
    assert_within(run("gate_up").buffers.gated[:M], expected, error + 2**-20 * expected.abs())

    normed = normalized(x, *weights.next_norm)
    heads, error = (y.view(M, -1, 2, K // 2) for y in product(normed, weights.qkv))
    turned = run("qkv")
    at = turned.rotary.positions_M.long()
    cos, sin = (t[at].double()[:, None] for t in (turned.rotary.cos, turned.rotary.sin))
    low, high = heads.unbind(2)
    rotated = torch.stack([low * cos - high * sin, high * cos + low * sin], 2)
    # Each half of a turned head is a sum of both, times at most 1, in two roundings.
    error = error.sum(2, keepdim=True) + 2**-23 * heads.abs().sum(2, keepdim=True)
    q, k, v = rotated[:, :H], rotated[:, H : H + G], heads[:, H + G :]
    actual = turned.buffers.q[:M], *turned.kv()
    for ours, expected, bound in zip(
        actual, (q, k, v), error.expand_as(heads).split([H, G, G], 1), strict=True
    ):
        assert_within(ours.flatten(2), expected.flatten(2), bound.flatten(2))


def check_layer(shape: Shape, weights: StreamWeights, M: int) -> None:
    x, attended, gated = inputs(shape, M)
    T = 5 if M % 5 == 0 else 1
    run = Run(shape, weights, x, attended, torch.full_like(gated, torch.nan), T=T)
    run.launch(PHASES["layer"])
    wide = {
        key: (getattr(weights, key)[0].double(), EPS)
        if "norm" in key
        else getattr(weights, key).double()
        for key in PHASES["layer"]
    }
    x, qkv = stream_layer_reference(x.double(), attended.double(), StreamWeights(**wide))
    # Lengths of rows: one rounding after o, two in a norm, one of gated, whose two factors both
    # carry the three before (silu's slope is 1.1), one after down; for qkv two more and its own.
    assert relative(run.buffers.x[:M], x) < 9 * rounding(shape.dtype)
    q = run.buffers.q[:M].double()
    heads = torch.cat([q, run.kv()[0].double()], 1).square()
    turned = qkv.view(M, -1, 2, shape.K // 2)[:, : shape.H + shape.G].square()
    # Turning keeps the length of each pair.
    pairs = heads.view(M, shape.H + shape.G, 2, -1).sum(2).sqrt()
    assert relative(pairs.flatten(1), turned.sum(2).sqrt().flatten(1)) < 12 * rounding(shape.dtype)
    values = qkv[:, -shape.G * shape.K :]
    assert relative(run.kv()[1].flatten(1), values) < 12 * rounding(shape.dtype)


def relative(actual: Tensor, expected: Tensor) -> float:
    """The largest relative error of a row, in length."""
    return ((actual.double() - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


def check_places(shape: Shape, weights: StreamWeights, T: int, M: int) -> None:
    # Slots of a sequence in no order, as branches of a tree have them.
    generator = torch.Generator().manual_seed(T)
    slots = [torch.randperm(CAPACITY, generator=generator)[:T] for _ in range(M // T)]
    run = Run(shape, weights, *inputs(shape, M), T=T, places=torch.cat(slots))
    run.launch(PHASES["layer"])
    straight = Run(shape, weights, *inputs(shape, M), places=torch.cat(slots))
    straight.launch(PHASES["layer"])
    assert torch.equal(run.kv(), straight.kv())
    assert not (run.kv() == UNTOUCHED).all(-1).any()
    sequences = torch.arange(M, device=shape.device) // T
    for cache in (run.rotary.keys, run.rotary.values):
        cache[sequences, :, run.rotary.slots_M.long()] = UNTOUCHED
        assert (cache == UNTOUCHED).all()
    buffers = run.buffers
    for rows in (buffers.x, buffers.squares, buffers.gated, buffers.q):
        assert (rows[M:] == UNTOUCHED).all()
    assert (buffers.normed == UNTOUCHED).all()


def check_pieces(shape: Shape, weights: StreamWeights, M: int) -> None:
    """A layer in pieces has the bits of the whole, as on the lower rungs of the ladder."""
    x, attended, gated = inputs(shape, M)
    whole = Run(shape, weights, x, attended, gated).launch(PHASES["layer"])
    for pdl in (True, False):
        run = Run(shape, weights, x, attended, gated, pdl=pdl)
        run.buffers.counters.copy_(whole.buffers.counters)  # what was launched before is nothing
        run.launch(QKV)
        for phases, norm in ((O_PROJ, None), (MLP[1:], weights.norm), (QKV, weights.next_norm)):
            if norm:
                run.buffers.normed[:M] = normalized(run.buffers.x[:M], *norm)
            run.launch(phases, fused=False)
        for ours, theirs in zip(run.outputs(), whole.outputs(), strict=True):
            assert torch.equal(ours, theirs)
