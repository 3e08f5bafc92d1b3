"""python lone_steps.py SECONDS SEED: one step at a time, of changing rows and lengths, bit by bit.

Several such processes at once take turns on the GPU, so that each step begins on a device that has
just done something else: no address is translated yet, small loads take microseconds, and whatever
rests on their being fast shows. Before every step the cache is as it was at first, and tokens
change from one to the next: nothing stale is right. Prints how many steps there were, and how many
differed.
"""

import random
import sys
import time
from collections import Counter

import torch
from torch import Tensor

from draftnorm.model.cache import KVCache
from draftnorm.model.config import ModelConfig
from draftnorm.model.decode_step import DecodeStep
from draftnorm.model.transformer import Transformer

CONTEXTS, ROWS, VARIANTS, TRIES = (64, 200, 300), (1, 5), 4, 5
WIDE = dict(
    vocab_size=8192, hidden_size=2048, intermediate_size=8192, num_layers=6, num_heads=32,
    num_kv_heads=8, head_size=64, context=512, initializer_range=0.02,
)  # fmt: skip
Case = tuple[int, list[int]]


def main(seconds: float, seed: int) -> None:
    choices = random.Random(seed)
    config = ModelConfig(**WIDE)
    model = Transformer(config, device="cuda", dtype=torch.bfloat16).init_weights(seed=1)
    cache = KVCache(config, capacity=320, device="cuda", dtype=torch.bfloat16)
    # All keys and values in one block, put back and compared at once.
    block = torch.empty(len(cache.keys), 2, *cache.keys[0].shape, device="cuda").bfloat16()
    block.normal_(generator=torch.Generator("cuda").manual_seed(1))
    cache.keys, cache.values = list(block[:, 0]), list(block[:, 1])
    before = block.clone()
    step = DecodeStep(model, cache, rows=max(ROWS))
    assert step.streamed_layers
    cases = [
        (context, [(7919 * (row + 1) + 1009 * variant + context) % 8192 for row in range(rows)])
        for context in CONTEXTS
        for rows in ROWS
        for variant in range(VARIANTS)
    ]

    def run(case: Case) -> Tensor:
        """Everything that the step leaves, as bytes."""
        cache.lengths[0], tokens = case
        logits = step.forward([tokens])
        left = torch.cat([block.view(torch.uint8).flatten(), logits.view(torch.uint8).flatten()])
        block.copy_(before)
        return left

    for case in cases:  # compiled and captured here
        run(case)
    right = []
    for case in cases:
        tries = [run(case) for _ in range(TRIES)]
        digests = [hash(left.cpu().numpy().tobytes()) for left in tries]
        right.append(tries[digests.index(Counter(digests).most_common(1)[0][0])])
    steps = wrong = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if choices.random() < 0.3:
            torch.cuda.synchronize()
            time.sleep(choices.uniform(0.0005, 0.003))
        case = choices.randrange(len(cases))
        wrong += not torch.equal(run(cases[case]), right[case])
        steps += 1
    print(steps, wrong)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
