"""What a request needs in memory, said before loading."""

import dataclasses

import pytest
import torch

from draftnorm.model import memory
from draftnorm.model.cache import KVCache
from draftnorm.model.config import ModelConfig
from draftnorm.model.memory import WORK, MemoryNeed
from draftnorm.model.transformer import Transformer
from draftnorm.scripts.shapes import SHAPES

TINY = ModelConfig(
    vocab_size=50, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=2,
    num_kv_heads=1, head_size=8, context=512,
)  # fmt: skip


def test_it_counts_what_is_allocated() -> None:
    need = MemoryNeed.of([TINY, TINY], 100, torch.device("cpu"), torch.bfloat16)
    model = Transformer(TINY, dtype=torch.bfloat16)
    cache = KVCache(TINY, capacity=100, dtype=torch.bfloat16)
    assert need.weights == 2 * sum(p.nbytes for p in model.parameters())
    assert need.cache == 2 * sum(layer.nbytes for layer in cache.keys + cache.values)
    assert need.total == need.weights + need.cache + WORK
    longer = MemoryNeed.of([TINY], 10_000, torch.device("cpu"), torch.bfloat16)
    assert longer.cache == 2 * 3 * 512 * 8 * 2  # a draft's cache ends at its context


def test_the_published_8b_by_hand() -> None:
    config = ModelConfig(**SHAPES["llama-3.1-8b"])
    need = MemoryNeed.of([config], 8192, torch.device("cpu"), torch.bfloat16)
    assert need.weights == 2 * 8_030_261_248
    assert need.cache == 2 * 32 * 8192 * 8 * 128 * 2
    assert str(dataclasses.replace(need, free=int(140e9))) == "needs 17.4 GB of 140.0 GB free"


@pytest.mark.parametrize(
    ("free", "lower"),
    [(17e9, "the context or the number of new tokens"), (16e9, "the size of the dtype")],
)
def test_too_much_is_refused_and_the_number_to_lower_named(free, lower, monkeypatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: int(free))
    config = ModelConfig(**SHAPES["llama-3.1-8b"])
    need = MemoryNeed.of([config], 8192, torch.device("cuda"), torch.bfloat16)
    with pytest.raises(ValueError, match=f"8,192 tokens 1.1 GB.*; lower {lower}") as error:
        need.check()
    assert "\n" not in str(error.value)
    dataclasses.replace(need, free=need.total).check()
