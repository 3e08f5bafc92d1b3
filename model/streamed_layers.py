"""The layers of a decode step by kernels/weight_stream.py: two kernels a layer, attention and it.

For models of plain dense layers 2,048 to 4,096 wide on Hopper (`can_stream`); all others take the
kernels of model/decode_step.py, one a product. Which way it is follows from configuration, dtype
and device alone.
"""

from threading import Lock
from typing import TYPE_CHECKING, ClassVar

import torch

from draftnorm.kernels.projection import Rotary
from draftnorm.kernels.rms_norm import rms_norm_forward
from draftnorm.kernels.weight_stream import (
    COUNTERS,
    ROWS,
    WIDTH,
    StreamBuffers,
    StreamWeights,
    ring_slots,
    stream_layer,
)
from draftnorm.model.config import ModelConfig
from draftnorm.model.transformer import Layer, RMSNorm

if TYPE_CHECKING:
    from draftnorm.model.decode_step import DecodeStep

LEAST_WIDTH = 2048  # narrower layers are faster with a kernel a product (NOTES.md)
LEAST_SLOTS = 4  # a pair under way and one in use


def can_stream(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this model goes this way on this device.

    The rows of a wider one would leave too little of the shared memory to its weights.
    """
    if (
        dtype.itemsize != 2
        or device.type != "cuda"
        or torch.cuda.get_device_capability(device)[0] != 9
    ):
        return False
    biases = config.qkv_bias or config.output_bias or config.mlp_bias
    if config.num_experts or config.qk_norm or biases:
        return False
    D, K = config.hidden_size, config.head_size
    widths = D, config.intermediate_size, config.num_heads * K
    if any(width % WIDTH for width in widths) or K % 16 or D < LEAST_WIDTH:
        return False
    return ring_slots(D, ROWS)[0] >= LEAST_SLOTS


class StreamedLayers:
    """What DecodeStep launches in place of a layer's own kernels."""

    # Where each device last replayed such a step: two at once could each hold half of it for good.
    _streams: ClassVar[dict[torch.device, torch.cuda.Stream]] = {}
    _lock: ClassVar[Lock] = Lock()

    def __init__(self, step: "DecodeStep") -> None:
        rows, config = step.rows, step.config
        # Not the step itself: a circle would let its graphs die whenever the collector comes by,
        # which may be while another is being captured, and that ends a capture.
        gated = step.gated[: rows * config.intermediate_size]
        self.buffers = StreamBuffers(
            x=step.x, squares=step.squares, normed=step.normed, q=step.q,
            gated=gated.view(rows, -1), attended=step.attended.view(rows, -1),
            counters=torch.zeros(COUNTERS, dtype=torch.int64, device=step.x.device),
        )  # fmt: skip

    def launch(self, step: "DecodeStep", rows: int, T: int, tier: int) -> None:
        """Enqueue all layers of a step of `rows` rows, T a sequence."""
        layers = list(step.model.model.layers)
        self._norm(step, layers[0].input_layernorm, rows)
        self._stream(step, None, layers[0], 0, rows, T, qkv=True)
        for index, (layer, after) in enumerate(zip(layers, [*layers[1:], None], strict=True)):
            step.attend(index, T, tier, eager=True)
            where = min(index + 1, len(layers) - 1)
            if step.norm == "fused":
                self._stream(
                    step, layer, after, where, rows, T, o=True, mlp=True, qkv=after is not None
                )
                continue
            self._stream(step, layer, after, where, rows, T, o=True)
            self._norm(step, layer.post_attention_layernorm, rows)
            self._stream(step, layer, after, where, rows, T, mlp=True)
            if after is not None:
                self._norm(step, after.input_layernorm, rows)
                self._stream(step, layer, after, where, rows, T, qkv=True)

    def replay(self, graph: torch.cuda.CUDAGraph) -> None:
        """Replay a step; on another stream than the last one's, behind all that one has."""
        device = self.buffers.x.device
        with self._lock:
            stream = torch.cuda.current_stream(device)
            last = self._streams.setdefault(device, stream)
            if last != stream:
                stream.wait_stream(last)
                self._streams[device] = stream
            graph.replay()

    def _norm(self, step: "DecodeStep", norm: RMSNorm, rows: int) -> None:
        """On the lower rungs of the ladder another kernel normalises."""
        if step.norm != "fused":
            inference = step.norm == "inference"
            x = self.buffers.x[:rows]
            y, _ = rms_norm_forward(x, norm.weight, norm.eps, inference_mode=inference)
            self.buffers.normed[:rows].copy_(y)

    def _stream(
        self, step: "DecodeStep", layer: Layer | None, after: Layer | None, where: int, rows: int,
        T: int, *, o: bool = False, mlp: bool = False, qkv: bool = False,
    ) -> None:  # fmt: skip
        """The rest of `layer`, and the qkv of the one after it, whose cache is layer `where`'s."""
        cache = step.cache
        rotary = Rotary(
            cos=step.cos, sin=step.sin, positions_M=step.positions, slots_M=step.slots,
            rows_per_sequence=T, keys=cache.keys[where], values=cache.values[where],
        )  # fmt: skip
        weights = StreamWeights(
            o=layer.self_attn.o_proj.weight if o else None,
            norm=_norm_of(layer.post_attention_layernorm) if mlp else None,
            gate_up=layer.mlp.gate_up_proj.weight if mlp else None,
            down=layer.mlp.down_proj.weight if mlp else None,
            next_norm=_norm_of(after.input_layernorm) if qkv else None,
            qkv=after.self_attn.qkv_proj.weight if qkv else None,
        )
        stream_layer(
            weights, self.buffers, rows=rows, rotary=rotary, fused=step.norm == "fused",
            pdl=step.pdl,
        )  # fmt: skip


def _norm_of(norm: RMSNorm) -> tuple[torch.Tensor, float]:
    return norm.weight, norm.eps
