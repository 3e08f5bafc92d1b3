"""Training: next-token prediction on packed blocks, on our own Transformer and its RMSNorm.

The same loop trains the target here and, with another loss, the draft (decoding/distillation.py).
AdamW steps fp32 master weights, of which the model holds a bf16 image on a GPU (on a CPU both are
the same fp32 tensors); the learning rate warms up linearly and falls along a cosine. Everything a
step reads is the state (step, masters, moments) and the batch, and the batch is a function of the
step: a run that was killed goes on from its last checkpoint with the same bits on the same machine.

Shapes: B sequences, T tokens, M rows (B·T), V vocabulary, E experts, A experts a token.
Sources: Loshchilov & Hutter 2019 (AdamW); Fedus et al. 2022 (load balancing); Zoph et al. 2022
(router z-loss).
"""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from draftnorm.model.config import ModelConfig
from draftnorm.model.corpus import TokenBlocks
from draftnorm.model.transformer import Transformer

# (model, tokens [B, T + 1]) -> the loss to minimise and the numbers to report, all fp32 scalars.
Loss = Callable[[Transformer, Tensor], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """One training run. `batch_size` counts blocks of `block_size` tokens a step."""

    steps: int
    batch_size: int
    block_size: int
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    final_fraction: float = 0.02  # of the learning rate, where the cosine ends
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    load_balancing: float = 0.01
    z_loss: float = 1e-3
    checkpoint_every: int = 1000
    report_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "block_size", "checkpoint_every", "report_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine down to final_fraction at the last step."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.learning_rate * (self.final_fraction + (1 - self.final_fraction) * cosine)


def llama_config(**fields: int | str) -> ModelConfig:
    """The draft's layout: tied head, special tokens as our tokenizers have them."""
    return ModelConfig(
        tie_embeddings=True, bos_token_id=1, eos_token_ids=(2,), initializer_range=0.03, **fields
    )


def mixtral_config(**sizes: int) -> ModelConfig:
    """The target's layout: the same with experts in every layer."""
    return llama_config(architecture="mixtral", intermediate_size=sizes["expert_size"], **sizes)


# "target" was trained on one GPU; "tiny" shows every moving part within a minute on a CPU.
PRESETS: dict[str, tuple[ModelConfig, TrainingConfig]] = {
    "target": (
        mixtral_config(
            vocab_size=8192, hidden_size=256, num_layers=6, num_heads=8, num_kv_heads=2,
            head_size=32, num_experts=8, experts_per_token=2, expert_size=208, context=2048,
        ),
        TrainingConfig(steps=6000, batch_size=64, block_size=1024, warmup_steps=200),
    ),
    "tiny": (
        mixtral_config(
            vocab_size=512, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2,
            head_size=16, num_experts=4, experts_per_token=2, expert_size=64, context=256,
        ),
        TrainingConfig(steps=150, batch_size=8, block_size=128, warmup_steps=20),
    ),
}  # fmt: skip


def router_losses(
    router_logits: list[Tensor], experts_per_token: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Load-balancing loss, z-loss, and the share of routed tokens [layers, E] each expert got.

    Balance is E · Σ_e share_e · mean probability_e: 1 when even, E when one expert takes all. The
    shares have no gradient; the probabilities carry it (Fedus et al. 2022, eq. 4).
    """
    logits_LME = torch.stack(router_logits)
    E = logits_LME.shape[-1]
    probabilities_LME = logits_LME.softmax(dim=-1)
    chosen_LMA = probabilities_LME.topk(experts_per_token).indices
    experts_E = torch.arange(E, device=chosen_LMA.device)
    share_LE = (chosen_LMA[..., None] == experts_E).float().mean(dim=(1, 2))
    balance = E * (share_LE * probabilities_LME.mean(dim=1)).sum(dim=-1).mean()
    z_loss = logits_LME.logsumexp(dim=-1).square().mean()
    return balance, z_loss, share_LE


def next_token_loss(config: TrainingConfig) -> Loss:
    """Cross-entropy of the next token in nats, plus the router's two terms for an MoE model."""

    def loss_of(model: Transformer, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        router_logits: list[Tensor] = []
        logits_BTV = model(tokens[:, :-1], router_logits=router_logits)
        loss = cross_entropy(logits_BTV.flatten(0, 1).float(), tokens[:, 1:].flatten())
        report = {"loss": loss.detach()}
        if router_logits:
            balance, z_loss, share_LE = router_losses(router_logits, model.config.experts_per_token)
            report |= {"balance": balance.detach(), "least_used_expert": share_LE.min()}
            loss = loss + config.load_balancing * balance + config.z_loss * z_loss
        return loss, report

    return loss_of


class MasterAdamW:
    """AdamW on fp32 master weights; the model's parameters are their image in its dtype."""

    def __init__(self, model: Transformer, config: TrainingConfig) -> None:
        self.parameters = list(model.parameters())
        # Where the model is fp32 already, `float()` copies nothing and masters are the parameters.
        self.masters = [parameter.detach().float() for parameter in self.parameters]
        groups = [
            {"params": [m for m in self.masters if m.dim() > 1]},
            {"params": [m for m in self.masters if m.dim() == 1], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(
            groups,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=model.device.type == "cuda",
        )
        self.clip_norm = config.clip_norm

    def step(self, learning_rate: float) -> Tensor:
        """One update from the parameters' gradients, which it clears; the norm before clipping."""
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad = parameter.grad.float()
        norm = torch.nn.utils.clip_grad_norm_(self.masters, self.clip_norm)
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.masters)
        for parameter in self.parameters:
            parameter.grad = None
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """The whole state by name: masters, both moments and step counts."""
        tensors = {f"{i}.master": master for i, master in enumerate(self.masters)}
        for i, state in self.adamw.state_dict()["state"].items():
            tensors |= {f"{i}.{name}": value for name, value in state.items()}
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` returned, in another process."""
        state = self.adamw.state_dict()
        for name, value in tensors.items():
            i, field = name.split(".")
            if field == "master":
                self.masters[int(i)].copy_(value)
            else:
                state["state"].setdefault(int(i), {})[field] = value
        self.adamw.load_state_dict(state)
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.masters)


def train(
    model: Transformer,
    config: TrainingConfig,
    blocks: TokenBlocks,
    loss_of: Loss,
    *,
    folder: Path,
    report: Callable[[dict], None] = lambda row: None,
) -> list[dict]:
    """Train `model` in place and return the history; continue from folder/state.safetensors.

    `report` gets {"step", "learning_rate", "tokens_per_second", "loss", ...} every report_every
    steps and at the last. Raises ValueError if the checkpoint found belongs to another
    configuration.
    """
    optimizer = MasterAdamW(model, config)
    first, history = _load_state(folder, optimizer, config, model.config)
    since, clock = first, time.perf_counter()
    for step in range(first, config.steps):
        tokens = blocks.batch(step, config.batch_size, seed=config.seed)
        loss, numbers = loss_of(model, tokens.to(model.device, non_blocking=True))
        loss.backward()
        learning_rate = config.learning_rate_at(step)
        numbers["gradient_norm"] = optimizer.step(learning_rate)
        done = step + 1
        if done % config.report_every == 0 or done == config.steps:
            # Reading the numbers waits for the device; between reports it runs ahead of the host.
            values = {name: value.item() for name, value in numbers.items()}
            now = time.perf_counter()
            rate = (done - since) * config.batch_size * config.block_size / (now - clock)
            since, clock = done, now
            row = {"step": done, "learning_rate": learning_rate, "tokens_per_second": rate}
            history.append(row | values)
            report(history[-1])
            if not math.isfinite(values["loss"]):
                raise ValueError(f"the loss is {values['loss']} at step {done}; train more gently")
        if done % config.checkpoint_every == 0 or done == config.steps:
            _save_state(folder, optimizer, config, model.config, done, history)
    return history


def _save_state(
    folder: Path,
    optimizer: MasterAdamW,
    config: TrainingConfig,
    shape: ModelConfig,
    step: int,
    history: list[dict],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = {"config": asdict(config), "model": shape.to_dict(), "step": step, "history": history}
    scratch = folder / "state.safetensors.new"
    tensors = {name: tensor.contiguous() for name, tensor in optimizer.tensors().items()}
    save_file(tensors, scratch, metadata={"state": json.dumps(state)})
    os.replace(scratch, folder / "state.safetensors")  # killed in between, the old one stays whole


def _load_state(
    folder: Path, optimizer: MasterAdamW, config: TrainingConfig, shape: ModelConfig
) -> tuple[int, list[dict]]:
    """The step to go on from and the history so far; (0, []) without a checkpoint."""
    file = folder / "state.safetensors"
    if not file.is_file():
        return 0, []
    with safe_open(file, framework="pt") as stored:
        state = json.loads(stored.metadata()["state"])
        ours = json.loads(json.dumps({"config": asdict(config), "model": shape.to_dict()}))
        if differing := [name for name in ours if ours[name] != state[name]]:
            raise ValueError(f"{file}: another run ({', '.join(differing)} differ); remove it")
        names = stored.keys()
        optimizer.restore({name: stored.get_tensor(name) for name in names})
    return state["step"], state["history"]


@torch.no_grad()
def evaluate(
    model: Transformer, blocks: TokenBlocks, *, batch_size: int = 16, max_blocks: int | None = None
) -> dict:
    """Nats a token over whole blocks, and each layer's share of tokens an expert (routing)."""
    count = min(len(blocks), max_blocks or len(blocks))
    nats, shares, T = 0.0, [], blocks.size
    for start in range(0, count, batch_size):
        stop = min(count, start + batch_size)
        tokens = torch.stack([blocks[i] for i in range(start, stop)]).to(model.device)
        router_logits: list[Tensor] = []
        logits_BTV = model(tokens[:, :-1], router_logits=router_logits)
        targets = tokens[:, 1:].flatten()
        nats += cross_entropy(logits_BTV.flatten(0, 1).float(), targets, reduction="sum").item()
        if router_logits:
            share_LE = router_losses(router_logits, model.config.experts_per_token)[2]
            shares.append(share_LE * (stop - start) / count)
    result = {"tokens": count * T, "nats_per_token": nats / (count * T)}
    return result | ({"routing": torch.stack(shares).sum(0).tolist()} if shares else {})
