"""The decode attention kernel in Triton's interpreter, across split borders, against float64."""

from itertools import pairwise

import pytest
import torch
import triton
import triton.language as tl
from decode_support import NO_PDL, assert_close, needs_run_time_loops, random
from torch import Tensor

from draftnorm.kernels import decode_attention as decode_attention_module
from draftnorm.kernels.decode_attention import (
    AttentionWorkspace,
    count_splits,
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


def assert_matches_float64(
    out: Tensor, q: Tensor, keys: Tensor, values: Tensor, starts: list[int], T: int,
    window: int | None = None,
) -> None:  # fmt: skip
    expected = decode_attention_reference(
        q.double(), keys.double(), values.double(), starts, rows=T, window=window
    )
    assert_close(out, expected, 64)  # softmax of scores up to 4: few-ulp exponentials


def cache(B: int, G: int, S: int, K: int) -> tuple[Tensor, Tensor]:
    return random(B, G, S, K, seed=1), random(B, G, S, K, seed=2)


@pytest.mark.parametrize("window", [None, 3, 250, 600])
@pytest.mark.parametrize("start", [0, 62, 126, 254, 510, 1021, 1534])
def test_matches_float64_at_split_borders(start: int, window: int | None) -> None:
    T, H, G, K, S = 4, 6, 2, 16, 1590
    keys, values = cache(1, G, S, K)
    keys[:, :, start + T :], values[:, :, start + T :] = torch.nan, torch.nan  # never written
    q = random(T, H, K)
    out = attend(q, keys, values, [start], T, count_splits(S), window=window)
    assert_matches_float64(out, q, keys, values, [start], T, window)


@triton.jit
def _places_kernel(first_ptr, of_first_ptr, of_last_ptr, place_ptr):
    """Where split i begins; of a border, and of the position before it, the split."""
    i = tl.program_id(0)
    place = tl.load(place_ptr + i)
    tl.store(first_ptr + i, decode_attention_module._first_of(i))
    tl.store(of_first_ptr + i, decode_attention_module._split_of(place))
    tl.store(of_last_ptr + i, decode_attention_module._split_of(tl.maximum(place - 1, 0)))


def test_splits_are_counted_as_the_kernel_cuts_them() -> None:
    """Borders of splits one by one; every tier but the last has whole groups of them."""
    borders, tiers = [0], decode_attention_module.TIERS
    while len(borders) <= 51:
        borders.append(borders[-1] + [keys for first, keys in tiers if first <= borders[-1]][-1])
    for (first, keys), (end, longer) in pairwise(tiers):
        assert keys < longer and (end - first) % (8 * keys) == 0
    for split, (begin, end) in enumerate(pairwise(borders)):
        assert count_splits(begin) == split
        assert {count_splits(n) for n in (begin + 1, begin + 77, end)} == {split + 1}
    places = torch.tensor(borders, dtype=torch.int32)
    firsts, of_first, of_last = torch.full((3, len(borders)), -7, dtype=torch.int32)
    _places_kernel[(len(borders),)](firsts, of_first, of_last, places)
    assert firsts.tolist() == borders
    assert of_first.tolist() == list(range(len(borders)))
    assert of_last.tolist()[1:] == list(range(len(borders) - 1))


# Above 128 numbers a head one block is on its way, not two.
@pytest.mark.parametrize("H,G,K", [(3, 1, 8), (8, 8, 20), (40, 2, 16), (2, 1, 136)])
def test_head_shapes_and_sequences_of_their_own_lengths(H: int, G: int, K: int) -> None:
    starts, T, S = [5, 300], 2, 320
    keys, values = cache(2, G, S, K)
    q = random(2 * T, H, K)
    out = attend(q, keys, values, starts, T, count_splits(S))
    assert_matches_float64(out, q, keys, values, starts, T)


def test_two_numbers_of_sixteen_bits_in_a_word() -> None:
    T, H, G, K, S = 3, 6, 2, 40, 200
    q, keys, values = (x.half() for x in (random(T, H, K), *cache(1, G, S, K)))
    out = attend(q, keys, values, [S - T], T, count_splits(S))
    expected = decode_attention_reference(
        q.double(), keys.double(), values.double(), [S - T], rows=T
    )
    # Weights and the result are each rounded to eleven bits, sums are fp32.
    assert (out.double() - expected).abs().max() <= 2**-10 * values.abs().max()


@pytest.mark.parametrize("window", [None, 200])
def test_neither_company_nor_the_grid_matters(window: int | None) -> None:
    T, H, G, K, S, start = 12, 4, 2, 16, 560, 506  # the rows straddle the border at 512
    keys, values = cache(1, G, S, K)
    q = random(T, H, K)
    room = count_splits(S)
    together = attend(q, keys, values, [start], T, room, window=window)
    for t in (0, 5, 6, 11):
        for splits in (room, 16):
            row = attend(q[t : t + 1], keys, values, [start + t], 1, splits, window=window)
            assert_close(row[0], together[t].double(), 64)  # equal bits: on the GPU


@pytest.mark.parametrize("window", [None, 3, 100, 200])
@pytest.mark.parametrize("T,start", [(1, 0), (2, 62), (3, 126), (1, 127), (2, 130), (4, 250)])
def test_two_splits_at_once_are_joined_as_in_memory(T: int, start: int, window: int | None) -> None:
    H, G, K, S = 4, 2, 40, 256
    keys, values = cache(1, G, S, K)
    keys[:, :, start + T :], values[:, :, start + T :] = torch.nan, torch.nan
    q = random(T, H, K)
    outs = [attend(q, keys, values, [start], T, splits, window=window) for splits in (2, 3, 4)]
    if start + T <= 128:
        outs.append(attend(q, keys, values, [start], T, 1, window=window))
    assert all(torch.equal(outs[0], out) for out in outs[1:])
    assert_matches_float64(outs[0], q, keys, values, [start], T, window)


def test_more_splits_than_a_group_joins() -> None:
    H, G, K, S = 2, 1, 16, 2248  # 8 splits of 128 keys and 5 of 256
    keys, values = cache(1, G, S, K)
    q = random(1, H, K)
    out = attend(q, keys, values, [S - 1], 1, count_splits(S))
    assert_matches_float64(out, q, keys, values, [S - 1], 1)


# One group of splits, two, four and seven, each of the last three from one tier into the next, and
# windows that begin in the middle of a share.
@pytest.mark.parametrize(
    "S,window", [(700, None), (700, 450), (2248, None), (2248, 1500), (6200, None), (17700, 1500)]
)
def test_how_many_splits_a_program_walks_over_is_nothing_to_the_bits(
    S: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    H, G, K, splits = 2, 1, 16, count_splits(S)
    keys, values = cache(1, G, S, K)
    q = random(1, H, K)
    outs = []
    for walk in (1, 4, 64):
        programs = decode_attention_module._shares(splits, walk)
        monkeypatch.setitem(decode_attention_module.PROGRAMS, 8, programs)
        outs.append(attend(q, keys, values, [S - 1], 1, splits, window=window))
    assert all(torch.equal(outs[0], out) for out in outs[1:])
    assert_matches_float64(outs[0], q, keys, values, [S - 1], 1, window)


@triton.jit
def _begins_kernel(split_ptr, key_ptr, doublings):
    split = decode_attention_module._share_begins(tl.program_id(0), doublings)
    tl.store(split_ptr + tl.program_id(0), split)
    tl.store(key_ptr + tl.program_id(0), decode_attention_module._first_of(split))


@pytest.mark.parametrize("walk", [1, 2, 4, 8, 16, 32, 64])
def test_shares_cover_the_splits_and_are_as_long_as_splits_allow(walk: int) -> None:
    for splits in (1, 5, 8, 9, 24, 25, 48, 49, 71):
        programs = decode_attention_module._shares(splits, walk)
        begins, keys = torch.empty(2, programs + 1, dtype=torch.int32)
        _begins_kernel[(programs + 1,)](begins, keys, walk.bit_length() - 1)
        begins, keys = begins.tolist(), keys.tolist()
        assert begins[0] == 0 and begins == sorted(set(begins))
        assert begins[-2] < splits <= begins[-1]
        assert all(a // 8 == (b - 1) // 8 for a, b in pairwise(begins))  # in one group
        for a, b in pairwise(keys):
            split = [keys for first, keys in decode_attention_module.TIERS if first <= a][-1]
            assert b - a == min(max(128 * walk, split), 8 * split)


@pytest.mark.parametrize("narrow", [0, decode_attention_module.PROGRAMS[8]])
@pytest.mark.parametrize("T,H,G", [(1, 9, 3), (2, 10, 1), (5, 4, 1), (5, 3, 1), (16, 4, 1)])
def test_tiles_of_eight_rows_and_of_sixteen(
    T: int, H: int, G: int, narrow: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(decode_attention_module.PROGRAMS, 8, narrow)
    starts, K, S = [120, 250], 16, 270
    keys, values = cache(2, G, S, K)
    q = random(2 * T, H, K)
    out = attend(q, keys, values, starts, T, count_splits(S))
    assert_matches_float64(out, q, keys, values, starts, T)


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
