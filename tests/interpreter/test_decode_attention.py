"""The decode attention kernel in Triton's interpreter, across split borders, against float64."""

import pytest
import torch
from decode_support import NO_PDL, assert_close, needs_run_time_loops, random
from torch import Tensor

from draftnorm.kernels.decode_attention import (
    SPLIT,
    AttentionWorkspace,
    decode_attention,
    decode_attention_reference,
    workspace_sizes,
)

pytestmark = needs_run_time_loops


def attend(
    q: Tensor, keys: Tensor, values: Tensor, starts: list[int], T: int, splits: int, **options
) -> Tensor:
    """Rows of each sequence at starts[b] …, in poisoned buffers."""
    _, H, K = q.shape
    positions = torch.tensor([p + t for p in starts for t in range(T)], dtype=torch.int32)
    sizes = workspace_sizes(len(starts), T, H, keys.shape[1], K, splits)
    acc, extremes = (torch.full((size,), torch.nan) for size in sizes[:2])
    workspace = AttentionWorkspace(
        acc=acc, extremes=extremes, tickets=torch.zeros(sizes[2], dtype=torch.int32)
    )
    out = torch.full_like(q, torch.nan)
    decode_attention(out, q, keys, values, positions, rows=T, splits=splits,
                     workspace=workspace, pdl=NO_PDL, **options)  # fmt: skip
    assert not workspace.tickets.any()
    return out


def cache(B: int, G: int, S: int, K: int) -> tuple[Tensor, Tensor]:
    return random(B, G, S, K, seed=1), random(B, G, S, K, seed=2)


@pytest.mark.parametrize("window", [None, 3, 250, 600])
@pytest.mark.parametrize("start", [0, 62, 254, 510, 511, 1030])
def test_matches_float64_at_split_borders(start: int, window: int | None) -> None:
    T, H, G, K, S = 4, 6, 2, 16, 1090
    keys, values = cache(1, G, S, K)
    keys[:, :, start + T :], values[:, :, start + T :] = torch.nan, torch.nan  # never written
    q = random(T, H, K)
    out = attend(q, keys, values, [start], T, 3, window=window)
    expected = decode_attention_reference(
        q.double(), keys.double(), values.double(), [start], rows=T, window=window
    )
    assert_close(out, expected, 64)  # softmax of scores up to 4: few-ulp exponentials


@pytest.mark.parametrize("H,G,K", [(3, 1, 8), (8, 8, 20), (40, 2, 16)])
def test_head_shapes_and_sequences_of_their_own_lengths(H: int, G: int, K: int) -> None:
    starts, T, S = [5, 300], 2, 320
    keys, values = cache(2, G, S, K)
    q = random(2 * T, H, K)
    out = attend(q, keys, values, starts, T, 2)
    expected = decode_attention_reference(
        q.double(), keys.double(), values.double(), starts, rows=T
    )
    assert_close(out, expected, 64)


@pytest.mark.parametrize("window", [None, 200])
def test_neither_company_nor_the_grid_matters(window: int | None) -> None:
    T, H, G, K, S, start = 12, 4, 2, 16, 560, 506  # the rows straddle the border at 512
    keys, values = cache(1, G, S, K)
    q = random(T, H, K)
    together = attend(q, keys, values, [start], T, 3, window=window)
    for t in (0, 5, 6, 11):
        for splits in (3, 40):
            row = attend(q[t : t + 1], keys, values, [start + t], 1, splits, window=window)
            assert_close(row[0], together[t].double(), 64)  # equal bits: on the GPU


def test_more_splits_than_a_group_joins() -> None:
    H, G, K, S = 2, 1, 16, 16 * SPLIT + 200
    keys, values = cache(1, G, S, K)
    q = random(1, H, K)
    out = attend(q, keys, values, [S - 1], 1, 17)
    expected = decode_attention_reference(
        q.double(), keys.double(), values.double(), [S - 1], rows=1
    )
    assert_close(out, expected, 64)


def test_a_path_of_a_tree_is_a_chain() -> None:
    T, H, G, K, S, start = 3, 4, 2, 16, 300, 250
    keys, values = cache(1, G, S, K)
    q = random(2 * T, H, K)
    places = torch.tensor([[260, 252, 291], [260, 270, 251]], dtype=torch.int32)
    scattered_keys, scattered_values = keys.clone(), values.clone()
    chains = []
    for path in range(2):
        rows = slice(path * T, path * T + T)
        chain_keys, chain_values = keys.clone(), values.clone()
        if path:  # the second branch shares its first row with the first
            chain_keys[:, :, 251:253], chain_values[:, :, 251:253] = cache(1, G, 2, K)
        chains.append(attend(q[rows], chain_keys, chain_values, [start], T, 2))
        scattered_keys[:, :, places[path].long()] = chain_keys[:, :, start : start + T]
        scattered_values[:, :, places[path].long()] = chain_values[:, :, start : start + T]
    tree = attend(q, scattered_keys, scattered_values, [start] * 2, T, 2, path_slots=places,
                  path_start=torch.tensor([start] * 2, dtype=torch.int32))  # fmt: skip
    assert torch.equal(tree, torch.cat(chains))
