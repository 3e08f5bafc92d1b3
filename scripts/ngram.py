"""An n-gram model to hold a small transformer against: the same tokens, only counted.

Shapes: N training tokens, T held-out tokens, V vocabulary.
"""

import torch
from torch import Tensor


def ngram_nats(train_N: Tensor, held_out_T: Tensor, V: int, order: int = 5) -> float:
    """Nats a held-out token under interpolated Kneser-Ney (Chen & Goodman 1999), discount 0.75.

    P_n(w | c) = max(count(c w) − d, 0) / total(c) + d · types(c) / total(c) · P_{n−1}(w | c'), down
    to 1 / V; below the highest order, count(g) is how many distinct (n+1)-grams end in g. An n-gram
    is known by its rank among the distinct ones; rank · V + token names its extension, so that
    every order is one sort of 64-bit keys.
    """
    discount = 0.75
    ranks, keys, counts = [torch.zeros_like(train_N)], [], []
    for n in range(order):  # an n-gram that ends at i is the context of i + 1
        found = torch.unique(
            ranks[n].roll(1) * V + train_N, return_inverse=True, return_counts=True
        )
        keys.append(found[0])
        ranks.append(found[1])
        if n > 0:  # one place of every distinct (n+1)-gram, to see which n-gram ends it
            places = torch.empty_like(keys[n]).scatter_(
                0, found[1], torch.arange(len(train_N)).to(train_N)
            )
            counts.append(torch.bincount(ranks[n][places], minlength=len(keys[n - 1])))
        last_counts = found[2]
    context_T = torch.zeros_like(held_out_T)  # rank of the context, -1 where it was never seen
    p_T = torch.full_like(held_out_T, 1 / V, dtype=torch.float64)
    for keys_n, counts_n in zip(keys, [*counts, last_counts], strict=True):
        total = torch.bincount(keys_n // V, weights=counts_n.double())
        types = torch.bincount(keys_n // V)
        wanted_T = context_T * V + held_out_T
        at_T = torch.searchsorted(keys_n, wanted_T).clamp(max=len(keys_n) - 1)
        found_T = (context_T >= 0) & (keys_n[at_T] == wanted_T)
        known_T = context_T.clamp(min=0, max=len(total) - 1)
        count_T = torch.where(found_T, counts_n[at_T] - discount, 0.0).clamp(min=0)
        longer_T = (count_T + discount * types[known_T] * p_T) / total[known_T]
        p_T = torch.where((context_T >= 0) & (total[known_T] > 0), longer_T, p_T)
        context_T = torch.where(found_T, at_T, -1).roll(1)
    return -p_T.log().mean().item()
