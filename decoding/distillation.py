"""Distillation: a small draft learns to say what its target would say next.

What decides a draft's worth is how often the target agrees with it on the target's own text, so the
draft is trained on text that the target generated, beside real text, towards the target's whole
distribution and, for greedy decoding, towards its first choice.

Shapes: B sequences, T tokens, S tokens of a whole sequence, M rows (B·T), V vocabulary.
Sources: Hinton et al. 2015; Zhou et al. 2024 (DistillSpec: on-policy data); Leviathan et al. 2023
(acceptance is the overlap of the two distributions).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention

from draftnorm.kernels.attention import block_attention
from draftnorm.kernels.rotary import rotate_heads
from draftnorm.model.config import ModelConfig
from draftnorm.model.corpus import TokenBlocks
from draftnorm.model.training import Loss, TrainingConfig, llama_config
from draftnorm.model.transformer import Call, Transformer

# The draft's run: small and quick, so that a step takes many tokens and a high learning rate.
DRAFT = TrainingConfig(
    steps=14_100, batch_size=16, block_size=1024, learning_rate=3e-3, warmup_steps=200
)

# Of the sequences that the target writes: greedy ones are easy, warm ones are learnt last.
TEMPERATURES = (0.0, 0.0, 0.0, 0.6, 0.8, 0.8, 0.8, 1.0)


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

        table = model.rotary_table(torch.arange(start, end, device=model.device).repeat(B))

        def attend(qkv_MNK: Tensor, layer: int) -> Tensor:
            heads = rotate_heads(qkv_MNK, table, shape[2])
            q, k, v = (x.reshape(B, end - start, -1, K) for x in heads)
            keys[layer, :, :, start:end] = k.transpose(1, 2)
            values[layer, :, :, start:end] = v.transpose(1, 2)
            past = keys[layer, :, :, :end], values[layer, :, :, :end]
            if end - start > 1:
                return block_attention(q, *past).reshape(B * (end - start), -1)
            # One query sees every key: without a mask the library takes its fast kernel.
            out_BH1K = scaled_dot_product_attention(q.transpose(1, 2), *past, enable_gqa=True)
            return out_BH1K.reshape(B, -1)

        tokens_M = tokens_BS[:, start:end].flatten()
        x_MD = model.run_layers(tokens_M, Call(attend))
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


def continuations(
    target: Transformer, prompts: TokenBlocks, *, batch_size: int
) -> Iterator[Tensor]:
    """Endless batches of what the target makes of <s> and a block of text; int64 [batch_size, S].

    S is two blocks: half prompt, half the target's own, at TEMPERATURES in turn. That is what a
    draft meets in use: soon after a prompt, before greedy text has run into its loop for long.
    """
    device = target.device
    rounds = -(-batch_size // len(TEMPERATURES))
    temperature_B = torch.tensor(TEMPERATURES, device=device).repeat(rounds)
    generator = torch.Generator(device).manual_seed(0)
    for step in count():
        prompts_BT = prompts.batch(step, batch_size, seed=1)[:, :-1].to(device)
        prompts_BT[:, 0] = target.config.bos_token_id
        yield sample_sequences(
            target, prompts_BT, 2 * prompts.size, temperature_B[:batch_size], generator
        )


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


@torch.no_grad()
def wanted(
    target: Transformer, context_BT: Tensor, *, first_choice: float
) -> tuple[Tensor, Tensor]:
    """What a draft should say after every token: fp32 weights [M, V] and the first choices [M].

    The weights are the target's distribution plus `first_choice` on its argmax.
    """
    logits_MV = target(context_BT).flatten(0, 1)
    p_MV = logits_MV.softmax(dim=-1, dtype=torch.float32)
    choice_M = logits_MV.argmax(dim=-1)
    p_MV.scatter_add_(1, choice_M[:, None], torch.full_like(p_MV[:, :1], first_choice))
    return p_MV, choice_M


def distillation_loss(target: Transformer, *, first_choice: float = 0.5) -> Loss:
    """Cross-entropy to the target's distribution plus `first_choice` times that to its argmax.

    The first term is what sampling wants, and is KL(target ‖ draft) up to the target's entropy; the
    second is what greedy decoding wants. "agreement" reports how often both have the same argmax.
    """

    def loss_of(draft: Transformer, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        context_BT = tokens[:, :-1]
        p_MV, choice_M = wanted(target, context_BT, first_choice=first_choice)
        logits_MV = draft(context_BT).flatten(0, 1)
        # A vocabulary of fp32 a row is what a step moves most of: the softmax casts on its way, and
        # one inner product makes no third tensor of that size.
        log_q_MV = logits_MV.log_softmax(dim=-1, dtype=torch.float32)
        loss = -torch.dot(p_MV.flatten(), log_q_MV.flatten()) / len(choice_M)
        agreement = (logits_MV.detach().argmax(dim=-1) == choice_M).float().mean()
        return loss, {"loss": loss.detach(), "agreement": agreement}

    return loss_of
