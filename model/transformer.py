"""Transformer: the one model of every family. Readable path on any device; three ways to call it.

    model(tokens_BT)                 no cache, differentiable: training, parity tests
    model.prefill(tokens_T, cache)   one sequence's prompt, in chunks at absolute positions
    model.decode(tokens_BT, cache)   a few new tokens a sequence: plain decoding and verification

Shapes: B sequences, T new tokens, M rows (B·T), D hidden, F feed-forward width, H query heads,
G key/value heads, N = H + 2G heads of q, k and v, K head size, V vocabulary, E experts,
A experts a token.

Exactness. A row of `decode` has the same bits whatever else is in the call: the layers only ever
see tiles of `row_tile` rows (padded), attention runs a row at a time, and every sum over experts
runs in slot order. The rows of a tile are in order of position, so later tiles find the keys of
earlier ones in the cache. `prefill` is a function of the prompt alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from draftnorm.kernels.attention import block_attention, row_attention
from draftnorm.kernels.compilation import Progress
from draftnorm.kernels.experts import grouped_experts, route, tile_experts
from draftnorm.kernels.gated import gated
from draftnorm.kernels.linear import block_linear, row_tile, tile_linear
from draftnorm.kernels.rms_norm import rms_norm
from draftnorm.kernels.rotary import (
    inverse_frequencies,
    rotary_table,
    rotate_heads,
    rotate_into_cache,
)
from draftnorm.model.cache import KVCache
from draftnorm.model.config import ModelConfig

PREFILL_CHUNK = 512  # chunks start at multiples of it, so a prompt's cache depends on it alone


class Call:
    """A pass through the layers: what the three ways of calling the model differ in.

    `attend(qkv_MNK, layer)` turns q and k, puts k and v where a cache is and returns attention's
    output [M, H·K]; it alone knows positions. `rows` are the real ones of a decode tile, of which
    products and experts are row-invariant; None outside decoding. `project(x_MK, weight_NK, bias_N,
    residual_MN)` is x Wᵀ + b + residual, perhaps in the residual's place. A list given as
    `router_logits` receives those of each MoE layer.
    """

    def __init__(
        self,
        attend: Callable[[Tensor, int], Tensor],
        *,
        rows: int | None = None,
        router_logits: list[Tensor] | None = None,
    ) -> None:
        self.attend, self.rows, self.router_logits = attend, rows, router_logits
        self.project = block_linear if rows is None else tile_linear
        self.experts_touched = 0


class Weights(nn.Module):
    """A weight [N, K] and perhaps a bias [N], uninitialised; what they are used for is the owner's.

    nn.Linear would initialise itself, and the first time that happens on the meta device torch
    imports its compiler: one second and 70 MB before the first token.
    """

    def __init__(self, rows: int, columns: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))
        self.bias = nn.Parameter(torch.empty(rows)) if bias else None


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """x + o(attention), q, k and v fused; where keys live and what is visible is the caller's."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        D, HK = config.hidden_size, config.num_heads * config.head_size
        rows = HK + 2 * config.num_kv_heads * config.head_size
        self.qkv_proj = Weights(rows, D, bias=config.qkv_bias)
        self.o_proj = Weights(D, HK, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_size, config.norm_eps)
            self.k_norm = RMSNorm(config.head_size, config.norm_eps)

    def forward(self, x_MD: Tensor, normed_MD: Tensor, call: Call) -> Tensor:
        H, G, K = self.config.num_heads, self.config.num_kv_heads, self.config.head_size
        qkv_MNK = call.project(normed_MD, self.qkv_proj.weight, self.qkv_proj.bias)
        qkv_MNK = qkv_MNK.view(-1, H + 2 * G, K)
        if self.config.qk_norm:
            q_MHK, k_MGK, v_MGK = qkv_MNK.split((H, G, G), dim=1)
            qkv_MNK = torch.cat((self.q_norm(q_MHK), self.k_norm(k_MGK), v_MGK), dim=1)
        out_MHK = call.attend(qkv_MNK, self.layer)
        return call.project(out_MHK, self.o_proj.weight, self.o_proj.bias, x_MD)


class MLP(nn.Module):
    """x + down(silu(gate y) · up y) with y the normed x, gate and up fused."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, F = config.hidden_size, config.intermediate_size
        self.gate_up_proj = Weights(2 * F, D, bias=config.mlp_bias)
        self.down_proj = Weights(D, F, bias=config.mlp_bias)

    def forward(self, x_MD: Tensor, normed_MD: Tensor, call: Call) -> Tensor:
        both_M2F = call.project(normed_MD, self.gate_up_proj.weight, self.gate_up_proj.bias)
        return call.project(gated(both_M2F), self.down_proj.weight, self.down_proj.bias, x_MD)


class Experts(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E, D, F = config.num_experts, config.hidden_size, config.expert_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * F, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, F))


class MoE(nn.Module):
    """x + the experts that a router chooses for the normed x, weighted by it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = Weights(config.num_experts, config.hidden_size)
        self.experts = Experts(config)

    def forward(self, x_MD: Tensor, normed_MD: Tensor, call: Call) -> Tensor:
        logits_ME = call.project(normed_MD, self.gate.weight)
        if call.router_logits is not None:
            call.router_logits.append(logits_ME.float())
        ids_MA, weights_MA = route(
            logits_ME, self.config.experts_per_token, renormalize=self.config.normalize_router
        )
        weights = (self.experts.gate_up_proj, self.experts.down_proj)
        if call.rows is None:
            return x_MD + grouped_experts(normed_MD, ids_MA, weights_MA, *weights)
        out_MD, touched = tile_experts(normed_MD, ids_MA, weights_MA, *weights, rows=call.rows)
        call.experts_touched += touched
        return x_MD + out_MD


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MoE(config) if config.is_sparse(layer) else MLP(config)

    def forward(self, x_MD: Tensor, call: Call) -> Tensor:
        x_MD = self.self_attn(x_MD, self.input_layernorm(x_MD), call)
        return self.mlp(x_MD, self.post_attention_layernorm(x_MD), call)


class _Body(nn.Module):
    """What Hugging Face calls `model.`: embedding, layers, final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Weights(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class Transformer(nn.Module):
    """A decoder-only language model, on `device` in `dtype`, with uninitialised weights.

    `init_weights` fills them at random; `draftnorm.load_model` from a checkpoint.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        with torch.device("meta"):
            self.model = _Body(config)
            if not config.tie_embeddings:
                self.lm_head = Weights(config.vocab_size, config.hidden_size)
        device, dtype = device or "cpu", dtype or torch.get_default_dtype()
        self._apply(lambda meta: torch.empty(meta.shape, device=device, dtype=dtype))

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.norm.weight.dtype

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> "Transformer":
        """Normal weights of config.initializer_range, norms 1, biases 0; the same on any device."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            else:
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(values * self.config.initializer_range)
        return self

    def forward(self, tokens_BT: Tensor, router_logits: list[Tensor] | None = None) -> Tensor:
        """Logits [B, T, V] of whole sequences, in the model's dtype; differentiable.

        A list given as `router_logits` receives the fp32 router logits [B·T, E] of each MoE layer.
        """
        B, T = tokens_BT.shape
        table = self.rotary_table(torch.arange(T, device=self.device).repeat(B))

        def attend(qkv_MNK: Tensor, layer: int) -> Tensor:
            heads = rotate_heads(qkv_MNK, table, self.config.num_kv_heads)
            q, k, v = (x.reshape(B, T, -1, self.config.head_size) for x in heads)
            window = self.config.windows[layer]
            out = block_attention(q, k.transpose(1, 2), v.transpose(1, 2), window=window)
            return out.reshape(B * T, -1)

        x_MD = self.run_layers(tokens_BT.flatten(), Call(attend, router_logits=router_logits))
        return linear(x_MD, self.head_VD()).view(B, T, -1)

    @torch.inference_mode()
    def prefill(
        self,
        tokens_T: Tensor | Sequence[int],
        cache: KVCache,
        *,
        sequence: int = 0,
        progress: Progress | None = None,
    ) -> Tensor:
        """Append a prompt to one sequence of the cache; the last token's logits, fp32 [V]."""
        tokens_T = self._as_tokens(tokens_T)
        if not len(tokens_T):
            raise ValueError("an empty prompt has no next token")
        span = cache.extend(len(tokens_T), sequence)
        start = span.start
        while start < span.stop:
            end = min(span.stop, (start // PREFILL_CHUNK + 1) * PREFILL_CHUNK)
            chunk_T = tokens_T[start - span.start : end - span.start]
            x_MD = self._prefill_chunk(chunk_T, cache, sequence, start)
            start = end
            if progress:  # a GPU's queue, and with it this loop, is a chunk or two ahead
                progress("reading the prompt", end - span.start, len(span))
        return linear(x_MD[-1], self.head_VD()).float()

    def _prefill_chunk(self, tokens_T: Tensor, cache: KVCache, b: int, start: int) -> Tensor:
        end = start + len(tokens_T)
        table = self.rotary_table(torch.arange(start, end, device=self.device))

        def attend(qkv_MNK: Tensor, layer: int) -> Tensor:
            stored, window = (cache.keys[layer], cache.values[layer]), self.config.windows[layer]
            q_MHK = rotate_into_cache(qkv_MNK, table, stored, b, start)
            first = 0 if window is None else max(0, start - window + 1)  # older keys are invisible
            visible = (x[b : b + 1, :, first:end] for x in stored)
            return block_attention(q_MHK[None], *visible, window=window).flatten(-2)[0]

        return self.run_layers(tokens_T, Call(attend))

    @torch.inference_mode()
    def decode(self, tokens_BT: Tensor | Sequence[Sequence[int]], cache: KVCache) -> Tensor:
        """Append T tokens to every sequence; logits after each, fp32 [B, T, V]. Row-invariant."""
        tokens_BT = self._as_tokens(tokens_BT)
        B, T = tokens_BT.shape
        if len(cache.lengths) != B:
            raise ValueError(
                f"{tokens_BT.shape=}, but the cache has {len(cache.lengths)} sequences"
            )
        rows = [(b, p) for b, span in enumerate(cache.extend_all(T)) for p in span]
        tokens_M, size = tokens_BT.flatten(), row_tile(self.device, self.dtype)
        tiles = [
            self._decode_tile(tokens_M[i : i + size], rows[i : i + size], cache, size)
            for i in range(0, len(rows), size)
        ]
        return torch.cat(tiles).view(B, T, -1)

    def _decode_tile(
        self, tokens_M: Tensor, rows: list[tuple[int, int]], cache: KVCache, size: int
    ) -> Tensor:
        """Logits of one tile; `rows` are (sequence, position), fewer than `size` in the last."""
        padding = size - len(rows)
        tokens_M = torch.nn.functional.pad(tokens_M, (0, padding))
        positions_M = torch.tensor([p for _, p in rows] + [0] * padding, device=self.device)
        table = self.rotary_table(positions_M)
        H, G, K = self.config.num_heads, self.config.num_kv_heads, self.config.head_size

        def attend(qkv_MNK: Tensor, layer: int) -> Tensor:
            q_MHK, k_MGK, v_MGK = rotate_heads(qkv_MNK, table, G)
            keys, values = cache.keys[layer], cache.values[layer]
            window = self.config.windows[layer]
            out_MHK = q_MHK.new_zeros(size, H * K)
            for m, (b, p) in enumerate(rows):
                keys[b, :, p] = k_MGK[m]
                values[b, :, p] = v_MGK[m]
                begin = 0 if window is None else max(0, p + 1 - window)
                out_MHK[m] = row_attention(q_MHK[m], keys[b], values[b], begin, p + 1).view(-1)
            return out_MHK

        call = Call(attend, rows=len(rows))
        x_MD = self.run_layers(tokens_M, call)
        cache.experts_touched += call.experts_touched
        cache.expert_layer_passes += sum(map(self.config.is_sparse, range(self.config.num_layers)))
        return tile_linear(x_MD, self.head_VD())[: len(rows)].float()

    def run_layers(self, tokens_M: Tensor, call: Call) -> Tensor:
        """Embedding, every layer, final norm: the normed hidden state [M, D] of M rows."""
        x_MD = embedding(tokens_M, self.model.embed_tokens.weight)
        for layer in self.model.layers:
            x_MD = layer(x_MD, call)
        return self.model.norm(x_MD)

    def rotary_table(self, positions_M: Tensor) -> tuple[Tensor, Tensor]:
        return rotary_table(positions_M, self.frequencies())

    def frequencies(self) -> Tensor:
        """Rotary angle per position of each pair of a head, fp32 [K/2]."""
        rope = asdict(self.config.rope)
        # Not blocking: a GPU would first finish what is queued, every chunk of a prompt.
        frequencies = inverse_frequencies(self.config.head_size, **rope)
        return frequencies.to(self.device, non_blocking=True)

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache for one sequence of so many tokens."""
        return KVCache(self.config, capacity=capacity, device=self.device, dtype=self.dtype)

    def head_VD(self) -> Tensor:
        """The output embedding, which may be the input one."""
        return (self.model.embed_tokens if self.config.tie_embeddings else self.lm_head).weight

    def _as_tokens(self, tokens: Tensor | Sequence) -> Tensor:
        return torch.as_tensor(tokens, dtype=torch.long, device=self.device)
