"""A diffusion model of the zoo, from diffusers, with a small configuration."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kfc_fx.tools.zoo.case import ModelCase, ZooEntry


def entries() -> Iterator[ZooEntry]:
    """The denoising UNet."""
    yield ZooEntry("diffusers", "unet", "UNet2DModel", _unet_case)


def _unet_case() -> ModelCase:
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).train()
    arguments = {"sample": torch.randn(2, 3, 16, 16), "timestep": torch.tensor([3, 70])}
    return ModelCase(model, (), arguments, likelihood="gaussian", size="16x16, 2 blocks")
