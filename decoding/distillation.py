"""Distillation: a small draft learns to say what its target would say next.

What decides a draft's worth is how often the target agrees with it on the target's own text, so the
draft is trained on text that the target generated, beside real text, towards the target's whole
distribution and, for greedy decoding, towards its first choice.

Shapes: B sequences, T tokens, S tokens of a whole sequence, M rows (B·T), V vocabulary,
N draft tokens.
Sources: Hinton et al. 2015; Zhou et al. 2024 (DistillSpec: on-policy data); Leviathan et al. 2023
(acceptance is the overlap of the two distributions).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention

from draftnorm.kernels.attention import block_attention
from draftnorm.model.config import ModelConfig
from draftnorm.model.corpus import TokenBlocks
from draftnorm.model.training import Loss, TrainingConfig, llama_config
from draftnorm.model.transformer import Call, Transformer

# The draft's run: small and quick, so that a step takes many tokens and a high learning rate.
DRAFT = TrainingConfig(
    steps=16_000, batch_size=16, block_size=1024, learning_rate=4e-3, warmup_steps=200
)


def draft_config(target: ModelConfig, *, num_layers: int, hidden_size: int) -> ModelConfig:
    """A Llama-style draft for `target`: its vocabulary and context, heads of 32."""
    if hidden_size % 64:
        raise ValueError(f"{hidden_size=} is not a multiple of 64, two heads of 32")
    heads = hidden_size // 32
    return llama_config(
        vocab_size=target.vocab_size,
        context=target.context,
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_heads=heads,
        num_kv_heads=heads // 2,
        head_size=32,
    )


@torch.no_grad()
def sample_sequences(
    model: Transformer,
    prompts_BT: Tensor,
    length: int,
    temperature_B: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Continue every prompt to `length` tokens; int64 [B, length]. Temperature 0 is greedy.

    All sequences step together on one key/value tensor, for throughput, unlike `decode`, which
    gives a row the same bits in any company. Sampling is the argmax after adding Gumbel noise,
    scaled by the temperature, to the logits.
    """
    (B, start), K = prompts_BT.shape, model.config.head_size
    shape = (model.config.num_layers, B, model.config.num_kv_heads, length, K)
    keys, values = (torch.empty(shape, device=model.device, dtype=model.dtype) for _ in "kv")
    tokens_BS = torch.empty(B, length, dtype=torch.long, device=model.device)
    tokens_BS[:, :start] = prompts_BT

    def extend(start: int, end: int) -> Tensor:
        """Run positions start … end - 1 of every sequence; logits of the last, fp32 [B, V]."""

        def attend(q_MHK: Tensor, k_MGK: Tensor, v_MGK: Tensor, layer: int) -> Tensor:
            q, k, v = (x.reshape(B, end - start, -1, K) for x in (q_MHK, k_MGK, v_MGK))
            keys[layer, :, :, start:end] = k.transpose(1, 2)
            values[layer, :, :, start:end] = v.transpose(1, 2)
            past = keys[layer, :, :, :end], values[layer, :, :, :end]
            if end - start > 1:
                return block_attention(q, *past).reshape(B * (end - start), -1)
            # One query sees every key: without a mask the library takes its fast kernel.
            out_BH1K = scaled_dot_product_attention(q.transpose(1, 2), *past, enable_gqa=True)
            return out_BH1K.reshape(B, -1)

        positions_M = torch.arange(start, end, device=model.device).repeat(B)
        tokens_M = tokens_BS[:, start:end].flatten()
        x_MD = model.run_layers(tokens_M, positions_M, attend, linear, Call())
        return linear(x_MD.view(B, end - start, -1)[:, -1], model.head_VD()).float()

    # Not cuDNN's attention: it plans anew for every length, 43 ms a step on an H200 and not 9.
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        logits_BV = extend(0, start)
        for end in range(start, length):
            noise_BV = torch.empty_like(logits_BV).exponential_(generator=generator).log_().neg_()
            tokens_BS[:, end] = (logits_BV + temperature_B[:, None] * noise_BV).argmax(dim=-1)
            if end + 1 < length:
                logits_BV = extend(end, end + 1)
    return tokens_BS


@dataclass(frozen=True, slots=True)
class MixedBlocks:
    """Blocks of several sources, an equal share of every batch from each (one may come twice)."""

    sources: Sequence[TokenBlocks]

    def batch(self, step: int, batch_size: int, *, seed: int) -> Tensor:
        """int64 [B, T + 1], a pure function of (step, seed), like TokenBlocks.batch."""
        if batch_size % len(self.sources):
            raise ValueError(f"{batch_size=} does not divide among {len(self.sources)} sources")
        share = batch_size // len(self.sources)
        batches = [b.batch(step, share, seed=seed + i) for i, b in enumerate(self.sources)]
        return torch.cat(batches)


def distillation_loss(target: Transformer, *, first_choice: float = 0.5) -> Loss:
    """Cross-entropy to the target's distribution plus `first_choice` times that to its argmax.

    The first term is what sampling wants, and is KL(target ‖ draft) up to the target's entropy; the
    second is what greedy decoding wants. "agreement" reports how often both have the same argmax.
    """

    def loss_of(draft: Transformer, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        context_BT = tokens[:, :-1]
        with torch.no_grad():
            p_MV = target(context_BT).flatten(0, 1).float().softmax(dim=-1)
            choice_M = p_MV.argmax(dim=-1)
            # Both terms are linear in the wanted probabilities: one pass over [M, V] does for both.
            p_MV.scatter_add_(1, choice_M[:, None], torch.full_like(p_MV[:, :1], first_choice))
        logits_MV = draft(context_BT).flatten(0, 1)
        loss = cross_entropy(logits_MV.float(), p_MV)
        agreement = (logits_MV.detach().argmax(dim=-1) == choice_M).float().mean()
        return loss, {"loss": loss.detach(), "agreement": agreement}

    return loss_of


def simulate_cycles(accepted_BT: Tensor, draft_length: int) -> tuple[float, float]:
    """(Tokens per cycle, acceptance rate) if draft t of a sequence is good where accepted[b, t].

    While drafts are accepted, the draft's context is the target's own text; so the agreement of
    both models on that text, known for every position, tells what every cycle would have accepted.
    """
    tokens = cycles = 0
    for row in accepted_BT.tolist():
        at = 0
        while at + draft_length < len(row):  # a cycle cut by the end would look like a rejection
            run = next((i for i in range(draft_length) if not row[at + i]), draft_length)
            at, tokens, cycles = at + run + 1, tokens + run + 1, cycles + 1
    if cycles == 0:
        raise ValueError(f"no whole cycle of {draft_length=} fits in {tuple(accepted_BT.shape)}")
    return tokens / cycles, (tokens / cycles - 1) / draft_length
