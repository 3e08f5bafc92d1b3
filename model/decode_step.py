"""DecodeStep: one decode step of a Transformer on a GPU, as a captured graph of fused kernels.

Shapes: B sequences, T new tokens of each, M = B·T rows, D hidden, F feed-forward width, H query
heads, G key/value heads, K head size, E experts, V vocabulary.

Five kernels a layer (norm + qkv + rotary + cache write; attention; output product + residual; norm
+ gate/up + SiLU; down product + residual), plus two for the router of a sparse layer; before them
the embedding, after them norm + head + argmax. On Hopper dense layers of 2,048 to 4,096 take two,
attention and all the rest (model/streamed_layers.py). Every buffer is allocated once; lengths,
positions and the text live on the device. A graph is captured once per T, context tier and ending
(kernels/cycle.py): a tier is only the room of attention's grid, and bits depend on none of it.

    step = DecodeStep(model, cache)
    logits_BTV = step.forward(tokens_BT)  # decode or verify, as Transformer.decode

A token is a row's argmax or, with `settings`, a sample (kernels/sample.py), chosen on the device.
Steps that nobody waits for are model/decode_run.py's. Who decodes asks `open_step`
(model/open_step.py) for one.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from draftnorm.kernels.compilation import Progress, compile_kernels
from draftnorm.kernels.cycle import Text, look_up
from draftnorm.kernels.decode_attention import (
    SPLIT,
    AttentionWorkspace,
    count_splits,
    decode_attention,
    workspace_sizes,
)
from draftnorm.kernels.decode_experts import route_rows
from draftnorm.kernels.decode_norm import SQUARES, Norm, normalize, pdl_options
from draftnorm.kernels.head import choose, embed
from draftnorm.kernels.projection import Experts, Rotary, Workspace, choose_tiling, project
from draftnorm.kernels.rms_norm import INTERPRETED, rms_norm_forward
from draftnorm.kernels.sample import Draw, SampleWorkspace, is_filtered, sample
from draftnorm.model.cache import KVCache
from draftnorm.model.streamed_layers import StreamedLayers, can_stream
from draftnorm.model.transformer import PREFILL_CHUNK, Layer, RMSNorm, Transformer

ROWS = 16  # the most rows of a step unless its owner asks for more
NORMS = ("train", "inference", "fused")


class DecodeStep:
    """Binds a model to a cache and to the device state of a step.

    `rows` bounds B·T of a call; `vocabulary` and `settings` are those of `open_step`. `norm` is
    the rung of the ladder: "fused" puts RMSNorm in the prologue of the product after it or, where
    that does not fit, finishes it from the sums that the product before it left; "inference" and
    "train" launch `rms_norm` without and with the store of rstd. All three give equal bits.
    `pdl=False` turns dependent launch off. `text` is another step's, for one to draft for the
    other; with `ngrams`, the lengths to look up, a cycle's drafts are the text's own.
    Raises ValueError for a model that is not on a GPU.
    """

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        *,
        rows: int = ROWS,
        norm: str = "fused",
        pdl: bool = True,
        vocabulary: int | None = None,
        settings: Tensor | None = None,
        text: Text | None = None,
        ngrams: range | None = None,
    ) -> None:
        config, device, dtype = model.config, model.device, model.dtype
        if not (device.type == "cuda" or INTERPRETED):
            raise ValueError(f"DecodeStep runs Triton kernels: the model is on {device}, not a GPU")
        if norm not in NORMS:
            raise ValueError(f"{norm=} is not one of {NORMS}")
        self.model, self.cache, self.config = model, cache, config
        self.rows, self.norm = rows, norm
        self.pdl = pdl_options(device) if pdl else {"PDL": False}
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        self.compile_seconds = self.capture_seconds = 0.0
        self.vocabulary = vocabulary or config.vocab_size
        self.text = text or Text.allocate(cache.capacity, device)
        self.ngrams = ngrams
        D, K, V = config.hidden_size, config.head_size, self.vocabulary
        B, H, G = len(cache.lengths), config.num_heads, config.num_kv_heads
        E, A = config.num_experts, config.experts_per_token
        self.batch = B

        def buffer(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        M, int32, fp32 = rows, torch.int32, torch.float32
        # What the host says before a step, in one copy; lengths aligned like every buffer.
        self.inputs = buffer(-(-M // 4) * 4 + B, dtype=int32)
        self.tokens, self.lengths = self.inputs[:M], self.inputs[-B:]
        self.settings = None if settings is None else settings.to(device)
        self.sampling = None  # at pure temperature the head's product does it
        if settings is not None and is_filtered(settings):
            self.sampling = SampleWorkspace.allocate(M, V, device)
        self.positions, self.slots = buffer(M, dtype=int32), buffer(M, dtype=int32)
        self.x, self.normed = buffer(M, D), buffer(M, D)
        self.q, self.attended = buffer(M, H, K), buffer(M, H, K)
        self.squares = buffer(M, -(-D // SQUARES), dtype=fp32)
        self.logits = buffer(M, V, dtype=fp32)
        self.touched = min(E, M * A)
        widths = [config.intermediate_size, self.touched * config.expert_size]
        self.gated = buffer(M * max(widths))
        self.router_logits = buffer(M, max(E, 1), dtype=fp32)
        self.routing = buffer(max(E, 1), M, dtype=fp32)
        self.sparse = [i for i in range(config.num_layers) if config.is_sparse(i)]
        # A line a sparse layer, aligned: how many experts its rows touch, and which.
        self.experts = buffer(len(self.sparse), -(-(1 + E) // 4) * 4, dtype=int32)
        self.experts_touched = buffer(len(self.sparse), dtype=int32)  # by all forward calls
        self.touched_by_cycles = self.forwards = self.passes = 0  # the latter with cycles
        # Pinned, so that a kernel can write it; -1 marks a token that is not there yet.
        pinned = dict(dtype=int32, pin_memory=device.type == "cuda")
        self.choices = torch.full((M,), -1, **pinned)
        self.told = torch.zeros(len(self.inputs), **pinned)
        # Rows of the last forward call, and whether steps run that nobody waited for.
        self.asked, self.under_way = 0, False
        self.aside = buffer(M, dtype=int32)  # the choices of steps that nobody waits for

        positions = cache.keys[0].shape[2]  # the capacity, rounded up
        rotary = torch.arange(positions, device=device)[:, None] * model.frequencies()
        self.cos, self.sin = rotary.cos(), rotary.sin()
        qkv_rows = (H + 2 * G) * K
        self.tilings = {
            "qkv": choose_tiling(qkv_rows, D, "rotary", head_norm=config.qk_norm),
            "o": choose_tiling(D, H * K, "residual"),
            "gate_up": choose_tiling(2 * config.intermediate_size, D, "gated"),
            "down": choose_tiling(D, config.intermediate_size, "residual"),
            "router": choose_tiling(max(E, 1), D, "plain"),
            "expert_gate_up": choose_tiling(2 * config.expert_size, D, "gated", expert=True),
            "expert_down": choose_tiling(D, config.expert_size, "residual", expert=True),
            "head": choose_tiling(V, D, "argmax"),
        }
        tiles = -(-V // self.tilings["head"].rows)
        self.best = buffer(M, tiles, dtype=fp32), buffer(M, tiles, dtype=int32)
        padded = -(-M // ROWS) * ROWS
        self.workspace = Workspace(
            partials=buffer(self.touched * D * padded, dtype=fp32),
            tickets=buffer(-(-D // ROWS) * padded // ROWS, dtype=int32),
        )
        self.streamed_layers = StreamedLayers(self) if can_stream(config, dtype, device) else None
        most_splits = self.tier(cache.capacity)
        sizes = [workspace_sizes(B, T, H, G, K, most_splits) for T in range(1, max(M // B, 1) + 1)]
        acc, extremes, tickets = map(max, zip(*sizes, strict=True))
        self.attention_workspace = AttentionWorkspace(
            acc=buffer(acc, dtype=fp32),
            extremes=buffer(extremes, dtype=fp32),
            tickets=buffer(tickets, dtype=int32),
        )

    @torch.inference_mode()
    def prepare(
        self,
        steps: Iterable[tuple[int, str]],
        lengths: range,
        progress: Progress | None = None,
    ) -> None:
        """Compile and capture what `open_step` lists, while the cache is empty."""
        if not self.x.is_cuda:
            return
        assert not any(self.cache.lengths), "compiling writes to the first positions"
        steps, tiers = list(steps), self._tiers(lengths)

        def launch_all() -> None:
            for T, end in steps:
                # One split, two, more and the most: all that attention does for T rows.
                for tier in {*tiers[:3], tiers[-1]}:
                    self.text.state.zero_()  # at the first positions each time
                    self.launch(T, tier, end)
            # Few rows and many: the norms of q and k then take another kernel.
            for count in {1, min(PREFILL_CHUNK, self.cache.capacity)}:
                self.model.prefill([0] * count, self.cache)
                self.cache.rollback(0)

        self.synchronize()  # launches below are no replays, which take turns
        start = time.perf_counter()
        compile_kernels(launch_all, progress)
        self.synchronize()
        for tensor in (self.inputs, self.experts_touched, self.text.tokens, self.text.state):
            tensor.zero_()
        compiled = time.perf_counter()
        graphs = [(T, tier, end) for tier in tiers for T, end in steps]
        for done, (T, tier, end) in enumerate(graphs, start=1):
            self.graph(T, tier, end)
            if progress:
                progress("capturing graphs", done, len(graphs))
        self.compile_seconds += compiled - start
        self.capture_seconds += time.perf_counter() - compiled

    @torch.inference_mode()
    def forward(self, tokens_BT: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """Append T tokens to every sequence of the cache; logits after each, fp32 [B, T, V].

        The result is a view of a buffer that the next call overwrites; `chosen` has the tokens.
        """
        sequences = tokens_BT.tolist() if isinstance(tokens_BT, Tensor) else tokens_BT
        tokens = [token for sequence in sequences for token in sequence]
        B, T = self.batch, len(sequences[0])
        if len(sequences) != B or len(tokens) != B * T or len(tokens) > self.rows:
            raise ValueError(
                f"tokens of {list(map(len, sequences))} are not {B} sequences of equal length with "
                f"at most {self.rows} rows together"
            )
        starts = [span.start for span in self.cache.extend_all(T)]
        self._tell(tokens, starts)
        self.choices.fill_(-1)
        self.asked = len(tokens)
        self.run(T, max(self.cache.lengths), "asked")
        self.forwards += 1
        self.passes += 1
        return self.logits[: B * T].view(B, T, -1)

    @property
    def chosen(self) -> list[int]:
        """The tokens after each row of the last `forward`, NO_TOKEN where there is none.

        Empty once a run has begun. Waits for the device, whose last kernel writes them over the
        bus: a copy would take longer.
        """
        choices = self.choices[: self.asked].numpy()
        while (choices == -1).any():
            torch.cuda.current_stream().query()  # raises if a kernel failed
        self.under_way &= not self.asked
        return choices.tolist()

    def expert_counts(self) -> tuple[int, int]:
        """Experts touched by the steps so far, and the layers that touched them (once a step)."""
        touched = self.touched_by_cycles
        if self.forwards and self.sparse:  # else nothing waits on the device
            touched += int(self.experts_touched.sum())
        return touched, self.passes * len(self.sparse)

    def _tell(self, tokens: Sequence[int], lengths: Sequence[int]) -> None:
        """Copy tokens and lengths to the device: from here on a step is under way."""
        if self.under_way:  # what was told before may not be copied, nor every answer written yet
            self.synchronize()
        self.under_way, told = True, self.told.numpy()
        told[: len(tokens)], told[-self.batch :] = tokens, lengths
        self.inputs.copy_(self.told, non_blocking=True)

    def tier(self, length: int) -> int:
        """Splits of attention's grid for a context of `length`: up to a power of two, or all."""
        # Of positions: splits grow, and twice as many would be four times the context, mostly idle.
        return count_splits(min(1 << (length - 1).bit_length(), self.cache.capacity))

    def _tiers(self, lengths: range) -> list[int]:
        """All tiers that contexts of these lengths need."""
        return sorted({self.tier(n) for n in (*lengths[::SPLIT], *lengths[-1:])})

    def __del__(self) -> None:
        # A kernel may still write to pinned memory, which its allocator would give to others.
        if getattr(self, "under_way", False):
            self.synchronize()

    def synchronize(self) -> None:
        if self.x.is_cuda:
            torch.cuda.synchronize()

    def run(self, T: int, length: int, end: str) -> None:
        """Replay the step for T rows and contexts of up to `length`, with one of ENDINGS."""
        tier = self.tier(length)
        if self.x.is_cuda:
            graph = self.graph(T, tier, end)
            if self.streamed_layers:
                self.streamed_layers.replay(graph)
            else:
                graph.replay()
        else:  # the interpreter
            self.launch(T, tier, end)

    def graph(self, T: int, tier: int, end: str) -> torch.cuda.CUDAGraph:
        """The captured step. A new one is launched to compile it, replayed once, and undone."""
        key = (T, tier, end)
        if key not in self.graphs:
            torch.cuda.synchronize()  # steps in flight still write the state
            text = (self.text.tokens, self.text.state, self.text.blocks)
            state = (self.inputs, self.choices, self.experts_touched, *text)
            saved = [tensor.clone() for tensor in state]

            def undone(run: Callable[[], None]) -> None:
                run()
                torch.cuda.synchronize()
                for tensor, value in zip(state, saved, strict=True):
                    tensor.copy_(value)

            undone(lambda: self.launch(T, tier, end))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.launch(T, tier, end)
            undone(graph.replay)  # the first takes 100 µs longer, which would mislead who measures
            self.graphs[key] = graph  # and not before: Ctrl-C would leave one that cannot replay
        return self.graphs[key]

    def launch(self, T: int, tier: int, end: str = "asked") -> None:
        """Enqueue the kernels of one step, with one of ENDINGS."""
        model, rows, text, told = self.model, self.batch * T, self.text, end == "asked"
        if self.ngrams and end == "cycle" and T > 1:
            look_up(text, drafts=T - 1, lengths=self.ngrams, pdl=self.pdl)
        embed(
            self.x, self.squares, self.positions, self.slots,
            self.tokens if told else text.tokens, self.lengths if told else text.length(end),
            model.model.embed_tokens.weight, rows=rows, rows_per_sequence=T, pdl=self.pdl,
            by_position=not told, stamp=text.stamp(end, T),
        )  # fmt: skip
        if self.streamed_layers:
            self.streamed_layers.launch(self, rows, T, tier)
        else:
            self._launch_layers(rows, T, tier)
        draw = None
        if self.settings is not None:
            draw = Draw(positions_M=self.positions, settings_BW=self.settings, rows_per_sequence=T)
        logits = self.logits if told or self.sampling else None
        head_VD = model.head_VD()[: self.vocabulary]
        self._project("head", logits, self.x, head_VD, rows, "argmax", best=self.best,
                      draw=None if self.sampling else draw, norm=model.model.norm)  # fmt: skip
        if self.sparse and told:
            self.experts_touched.add_(self.experts[:, 0])
        ending = dict(rows=rows, pdl=self.pdl, text=text, end=end, experts=self.experts)
        choices = self.choices if told else self.aside
        if self.sampling:
            sample(choices, self.logits, draw, workspace=self.sampling, **ending)
        else:
            choose(choices, self.best, **ending)

    def _launch_layers(self, rows: int, T: int, tier: int) -> None:
        for index, layer in enumerate(self.model.model.layers):
            self._attention(layer, index, T, tier)
            if self.config.is_sparse(index):
                self._experts(layer, self.experts[self.sparse.index(index)], rows)
            else:
                self._mlp(layer, rows)

    def _attention(self, layer: Layer, index: int, T: int, tier: int) -> None:
        attention, cache, rows = layer.self_attn, self.cache, self.batch * T
        qk_norm = self.config.qk_norm
        rotary = Rotary(
            cos=self.cos, sin=self.sin, positions_M=self.positions, slots_M=self.slots,
            rows_per_sequence=T, keys=cache.keys[index], values=cache.values[index],
            eps=self.config.norm_eps,
            q_norm=attention.q_norm.weight if qk_norm else None,
            k_norm=attention.k_norm.weight if qk_norm else None,
        )  # fmt: skip
        self._project("qkv", self.q, self.x, attention.qkv_proj.weight, rows, "rotary",
                      bias_N=attention.qkv_proj.bias, norm=layer.input_layernorm,
                      rotary=rotary)  # fmt: skip
        self.attend(index, T, tier)
        attended = self.attended.view(self.rows, -1)
        self._project("o", self.x, attended, attention.o_proj.weight, rows, "residual",
                      bias_N=attention.o_proj.bias)  # fmt: skip

    def attend(self, index: int, T: int, tier: int, *, eager: bool = False) -> None:
        """Launch attention of a layer: T rows of each sequence, `q` to `attended`."""
        decode_attention(
            self.attended, self.q, self.cache.keys[index], self.cache.values[index],
            self.positions, rows=T, splits=tier, workspace=self.attention_workspace, pdl=self.pdl,
            window=self.config.windows[index], eager=eager,
        )  # fmt: skip

    def _mlp(self, layer: Layer, rows: int) -> None:
        gate_up, down = layer.mlp.gate_up_proj, layer.mlp.down_proj
        gated = self.gated[: self.rows * self.config.intermediate_size].view(self.rows, -1)
        self._project("gate_up", gated, self.x, gate_up.weight, rows, "gated",
                      bias_N=gate_up.bias, norm=layer.post_attention_layernorm)  # fmt: skip
        self._project("down", self.x, gated, down.weight, rows, "residual", bias_N=down.bias)

    def _experts(self, layer: Layer, chosen: Tensor, rows: int) -> None:
        mlp, norm = layer.mlp, layer.post_attention_layernorm
        self._project("router", self.router_logits, self.x, mlp.gate.weight, rows, "plain",
                      norm=norm)  # fmt: skip
        route_rows(
            chosen, self.routing, self.router_logits, rows=rows,
            experts=self.config.experts_per_token, renormalize=self.config.normalize_router,
            pdl=self.pdl,
        )  # fmt: skip
        most = min(self.config.num_experts, rows * self.config.experts_per_token)
        into, out = (
            Experts(chosen=chosen, routing_EM=self.routing, most=most, own_input=own)
            for own in (False, True)
        )
        self._project("expert_gate_up", self.gated, self.x, mlp.experts.gate_up_proj, rows,
                      "gated", norm=norm, experts=into)  # fmt: skip
        self._project("expert_down", self.x, self.gated, mlp.experts.down_proj, rows, "residual",
                      experts=out)  # fmt: skip

    def _project(
        self, kind: str, out: Tensor | None, x: Tensor, weight: Tensor, rows: int, epilogue: str,
        *, norm: RMSNorm | None = None, **operands: Any,
    ) -> None:  # fmt: skip
        """A product with the norm before it; `operands` are what else `project` takes."""
        prologue = None
        if norm is not None and self.norm == "fused":
            prologue = Norm(weight=norm.weight, squares=self.squares, eps=norm.eps)
            if not self.tilings[kind].holds_norm(x.shape[1]):
                normalize(self.normed, x, prologue, rows=rows, pdl=self.pdl)
                x, prologue = self.normed, None
        elif norm is not None:
            x, _ = rms_norm_forward(
                x[:rows], norm.weight, norm.eps, inference_mode=self.norm == "inference"
            )
        residual, squares = (self.x, self.squares) if epilogue == "residual" else (None, None)
        project(
            out, x, weight, rows=rows, epilogue=epilogue, workspace=self.workspace,
            tiling=self.tilings[kind], pdl=self.pdl, norm=prologue, residual_MN=residual,
            squares_out=squares, **operands,
        )  # fmt: skip
