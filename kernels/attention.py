"""Causal attention with grouped heads and an optional sliding window, as library calls.

Shapes: B sequences, T new tokens, S keys, H query heads, G key/value heads, K head size.
A query at position p sees keys max(0, p - window + 1) … p.
"""

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.functional import scaled_dot_product_attention


def attention_reference(
    q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, *, start: int = 0, window: int | None = None
) -> Tensor:
    """The definition, row by row, for one sequence; query t stands at position start + t."""
    group = q_THK.shape[1] // k_SGK.shape[1]
    out_THK = torch.empty_like(q_THK)
    for t in range(q_THK.shape[0]):
        end = start + t + 1
        begin = 0 if window is None else max(0, end - window)
        for h in range(q_THK.shape[1]):
            k_SK, v_SK = k_SGK[begin:end, h // group], v_SGK[begin:end, h // group]
            weights_S = torch.softmax(k_SK @ q_THK[t, h] * q_THK.shape[2] ** -0.5, dim=0)
            out_THK[t, h] = weights_S @ v_SK
    return out_THK


def block_attention(
    q_BTHK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, *, window: int | None = None
) -> Tensor:
    """Attention of the last T of S positions over all S; differentiable. Returns [B, T, H, K]."""
    T, S = q_BTHK.shape[1], k_BGSK.shape[2]
    q_BHTK, grouped = q_BTHK.transpose(1, 2), q_BTHK.shape[2] != k_BGSK.shape[1]
    everything = window is None or window >= S
    if (
        q_BTHK.is_cuda
        and (T != S or not torch.is_grad_enabled())
        and everything
        and can_use_flash_attention(SDPAParams(q_BHTK, k_BGSK, v_BGSK, None, 0.0, False, grouped))
    ):
        # To the library's flash kernel "causal" means that the last query sees the last key, which
        # scaled_dot_product_attention cannot say: given a mask, it takes a slower kernel. Without
        # one it may take cuDNN's, which plans anew, for milliseconds, at every new length.
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(q_BHTK, k_BGSK, v_BGSK, is_causal=True)[0].transpose(1, 2)
    mask_TS = None
    if T != S or not everything:
        query_T1 = torch.arange(S - T, S, device=q_BTHK.device)[:, None]
        key_S = torch.arange(S, device=q_BTHK.device)
        mask_TS = key_S <= query_T1
        if window is not None:
            mask_TS &= key_S > query_T1 - window
    out_BHTK = scaled_dot_product_attention(
        q_BHTK, k_BGSK, v_BGSK, attn_mask=mask_TS, is_causal=mask_TS is None, enable_gqa=grouped
    )
    return out_BHTK.transpose(1, 2)


def row_attention(q_HK: Tensor, k_GSK: Tensor, v_GSK: Tensor, begin: int, end: int) -> Tensor:
    """One query over keys begin … end - 1; returns [H, K].

    One call a row, so that its shape, and with it the bits of the row, depend on the row's position
    alone. The heads that share a key/value head are the rows of that call. The query is copied: the
    library's bits depend on its alignment, which is another in each row of a tile if K is no
    multiple of 4. (KVCache aligns keys and values.)
    """
    G, _, K = k_GSK.shape
    out_GRK = scaled_dot_product_attention(
        q_HK.clone().view(1, G, -1, K), k_GSK[None, :, begin:end], v_GSK[None, :, begin:end]
    )
    return out_GRK.reshape(-1, K)
