"""The autoencoder of the first stage: MONAI's AutoencoderKL with strict sizes, and one that does nothing."""

from collections.abc import Iterable, Sequence

import torch
from monai.networks import nets
from monai.networks.blocks import UpSample
from torch import Tensor, nn

from ldae.models.blocks import GroupNorm, run
from ldae.models.cpu_kernels import EnlargingConv3d, with_onednn
from ldae.models.sizes import check_divisible, latent_sizes
from ldae.models.tiling import SlicedInference


class AutoencoderKL(nets.AutoencoderKL):
    """x (B, 1, X, Y, Z) in [0, 1] <-> posterior of the latent (B, C, X / s, Y / s, Z / s), s = 2^(levels - 1).

    No attention anywhere, as published. Parameter names are MONAI's.

    Args:
        channels: width of each level; all but the last end in a halving.
        residual_blocks: a level.
        groups: of every GroupNorm; divides every width.
        checkpointing: recompute activations in the backward pass, block by block: less memory, a third more time.
        tile: planes along x that are computed at a time where no gradient is asked for, so that a small GPU does
            full-size volumes (tiling.py; the same result up to rounding); None: all at once.
        initial_log_variance: what the posterior's log-variance starts near; None leaves it at about 0. A short run from
            scratch would spend its first hundreds of steps on learning to be less noisy. What noise stays, the
            diffusion learns too, and the codes of posterior means, which have none, are narrower for it.
        reference: shape (X, Y, Z) of the volumes whose mean latent `set_reference` stores; None: none, as published.
            With it, latents are differences from that mean: what all brains share need not be learned by the diffusion,
            and unit variance is the variance between people. Training itself (`forward`) does not see it.
    """

    def __init__(
        self,
        channels: Sequence[int] = (64, 128, 128, 128),
        residual_blocks: int = 2,
        latent_channels: int = 3,
        groups: int = 32,
        in_channels: int = 1,
        checkpointing: bool = False,
        initial_log_variance: float | None = None,
        reference: Sequence[int] | None = None,
        tile: int | None = None,
    ) -> None:
        super().__init__(
            spatial_dims=3,
            in_channels=in_channels,
            out_channels=in_channels,
            num_res_blocks=[residual_blocks] * len(channels),
            channels=tuple(channels),
            attention_levels=(False,) * len(channels),
            latent_channels=latent_channels,
            norm_num_groups=groups,
            with_encoder_nonlocal_attn=False,
            with_decoder_nonlocal_attn=False,
        )
        self.checkpointing = checkpointing
        self.tile = tile
        self.strides = (2 ** (len(channels) - 1),) * 3
        if initial_log_variance is not None:
            nn.init.constant_(self.quant_conv_log_sigma.conv.bias, initial_log_variance)
        if reference is not None:
            check_divisible(reference, self.strides, "reference")
            reference = torch.zeros(1, latent_channels, *latent_sizes(reference, self.strides))
        self.register_buffer("reference", reference)
        with_onednn(self)
        for module in self.modules():
            if type(module) is nn.GroupNorm:
                module.__class__ = GroupNorm
        for block in self.decoder.blocks:
            if isinstance(block, UpSample):
                block.upsample_non_trainable = nn.Identity()
                EnlargingConv3d.of(block.postconv.conv, (2, 2, 2))

    @torch.no_grad()
    def set_reference(self, volumes: Iterable[Tensor]) -> None:
        """Latents are differences from the mean latent of these volumes, (B, 1, X, Y, Z) each, from now on."""
        total, count = torch.zeros_like(self.reference, dtype=torch.float64), 0
        for x in volumes:
            total += self._posterior(x)[0].double().sum(0, keepdim=True)
            count += len(x)
        self.reference.copy_(total / count)

    def enable_checkpointing(self) -> None:
        """Recompute activations in the backward pass: less memory, more time."""
        self.checkpointing = True

    def _through(self, blocks: nn.ModuleList, h: Tensor) -> Tensor:
        if self.tile is not None and not torch.is_grad_enabled():
            return SlicedInference(self.tile, h.device).through(blocks, h)
        for block in blocks:
            h = run(block, self.checkpointing, h)
        return h

    def _posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean, without the reference, and standard deviation."""
        check_divisible(x.shape[2:], self.strides, "volume")
        h = self._through(self.encoder.blocks, x)
        log_variance = self.quant_conv_log_sigma(h).clamp(-30, 20)
        return self.quant_conv_mu(h), torch.exp(log_variance / 2)

    def _volume(self, z: Tensor) -> Tensor:
        return self._through(self.decoder.blocks, self.post_quant_conv(z))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior, (B, C, x, y, z) each, unscaled.

        Raises:
            UserError: the volume's sizes do not divide by `strides`.
        """
        mean, std = self._posterior(x)
        return mean if self.reference is None else mean - self.reference, std

    def decode(self, z: Tensor) -> Tensor:
        """The volume of an unscaled latent, (B, 1, X, Y, Z)."""
        return self._volume(z if self.reference is None else z + self.reference)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction, mean, std; decoded from mean + std * noise, or from the mean. The mean is the encoder's own,
        whatever the reference."""
        mean, std = self._posterior(x)
        return self._volume(mean if noise is None else torch.addcmul(mean, std, noise)), mean, std


class IdentityAutoencoder(nn.Module):
    """The latent is the scan itself: the same method in voxel space."""

    strides = (1, 1, 1)
    reference = None

    def __init__(self, latent_channels: int = 1) -> None:
        super().__init__()
        self.latent_channels = latent_channels

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x itself, and no spread."""
        return x, torch.zeros_like(x)

    def decode(self, z: Tensor) -> Tensor:
        """z itself."""
        return z

    def enable_checkpointing(self) -> None:
        """There is nothing to recompute."""
