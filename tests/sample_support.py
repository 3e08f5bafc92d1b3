"""What the tests of sampling share, on a GPU and interpreted."""

from collections.abc import Sequence

import torch
from torch import Tensor

from draftnorm.kernels.sample import Draw, pack_settings


def make_draw(positions: Sequence[int] | Tensor, settings: list[dict], device: str = "cpu") -> Draw:
    """Rows whose tokens will stand at these positions; fewer settings are shared by neighbours."""
    return Draw(
        positions_M=(torch.as_tensor(positions) - 1).to(device, torch.int32),
        settings_BW=torch.stack([pack_settings(**one) for one in settings]).to(device),
        rows_per_sequence=len(positions) // len(settings),
    )
