"""The autoencoder of stage 1, MONAI's AutoencoderKL (arXiv 2112.10752), and the identity, for diffusion of voxels."""

from collections.abc import Iterable, Sequence

import torch
from monai.networks import nets
from torch import Tensor, nn

from ldae.models.blocks import run_block
from ldae.models.sizes import check_divisible, latent_sizes
from ldae.models.sliced_inference import SlicedInference


class AutoencoderKL(nets.AutoencoderKL):
    """A scan x (B, 1, X, Y, Z) in [0, 1] <-> the posterior of its latent, (B, C, X / s, Y / s, Z / s).

    s = 2^(levels - 1). There is no attention, as published. The parameters have MONAI's names.

    Args:
        channels: number of channels of each level. Every level but the last ends with a halving of the sizes.
        residual_blocks: number of residual blocks of each level.
        latent_channels: C.
        groups: number of groups of every GroupNorm. It divides all `channels`.
        checkpointing: recompute activations in the backward pass, block by block. This takes less memory and a third
            more time.
        initial_log_variance: initial bias of the posterior's log-variance. Without it the log-variance starts near 0,
            and a short training spends its first hundreds of steps on reducing that noise. Diffusion learns the noise
            that is left, and the codes of posterior means, which have none, are narrower for it. None, as published.
        mean_latent_for: shape (X, Y, Z) of the training scans whose mean latent `set_mean_latent` stores. With it,
            `encode` subtracts and `decode` adds this mean: the diffusion need not learn what all brains share, and the
            unit variance of the latents is that between subjects. `forward`, which is trained, does not use it. None:
            no mean latent, as published.
        inference_planes: number of planes along x that are computed at a time where no gradient is needed, so that a
            small GPU can encode and decode full-size volumes (sliced_inference.py). The result is the same up to
            rounding. None: the whole volume at once.
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
        mean_latent_for: Sequence[int] | None = None,
        inference_planes: int | None = None,
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
        self.inference_planes = inference_planes
        self.strides = (2 ** (len(channels) - 1),) * 3
        if initial_log_variance is not None:
            nn.init.constant_(self.quant_conv_log_sigma.conv.bias, initial_log_variance)
        mean_latent = None
        if mean_latent_for is not None:
            check_divisible(mean_latent_for, self.strides, "model.autoencoder.mean_latent_for")
            mean_latent = torch.zeros(1, latent_channels, *latent_sizes(mean_latent_for, self.strides))
        self.register_buffer("reference", mean_latent)  # the name under which files of weights store it

    @property
    def mean_latent(self) -> Tensor | None:
        """The mean latent of the training scans, (1, C, x, y, z), or None if the autoencoder has none."""
        return self.reference

    @torch.no_grad()
    def set_mean_latent(self, volumes: Iterable[Tensor]) -> None:
        """Store the mean latent of these volumes, (B, 1, X, Y, Z) each, which `encode` subtracts from now on."""
        total, count = torch.zeros_like(self.reference, dtype=torch.float64), 0
        for x in volumes:
            total += self.encode_raw(x)[0].double().sum(0, keepdim=True)
            count += len(x)
        self.reference.copy_(total / count)

    def enable_checkpointing(self) -> None:
        """Recompute activations in the backward pass from now on: less memory, more time."""
        self.checkpointing = True

    def apply_blocks(self, blocks: nn.ModuleList, h: Tensor) -> Tensor:
        """One block after the other, the whole volume at once or in slices (`inference_planes`)."""
        if self.inference_planes is not None and not torch.is_grad_enabled():
            return SlicedInference(self.inference_planes, h.device).apply(blocks, h)
        for block in blocks:
            h = run_block(block, self.checkpointing, h)
        return h

    def encode_raw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean, from which the mean latent is not subtracted, and standard deviation, (B, C, x, y, z) each."""
        check_divisible(x.shape[2:], self.strides, "volume")
        h = self.apply_blocks(self.encoder.blocks, x)
        log_variance = self.quant_conv_log_sigma(h).clamp(-30, 20)
        return self.quant_conv_mu(h), torch.exp(log_variance / 2)

    def decode_raw(self, z: Tensor) -> Tensor:
        """The volume (B, 1, X, Y, Z) of a latent z (B, C, x, y, z) from which the mean latent is not subtracted."""
        return self.apply_blocks(self.decoder.blocks, self.post_quant_conv(z))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior, (B, C, x, y, z) each, before scaling to unit variance.

        Raises:
            UserError: the sizes of the volume do not divide by `strides`.
        """
        mean, std = self.encode_raw(x)
        return mean if self.mean_latent is None else mean - self.mean_latent, std

    def decode(self, z: Tensor) -> Tensor:
        """The volume (B, 1, X, Y, Z) of a latent z (B, C, x, y, z) in the units of `encode`."""
        return self.decode_raw(z if self.mean_latent is None else z + self.mean_latent)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction of x from mean + std * noise (without noise: from the mean), mean and std.

        The mean latent is not involved.
        """
        mean, std = self.encode_raw(x)
        return self.decode_raw(mean if noise is None else torch.addcmul(mean, std, noise)), mean, std


class IdentityAutoencoder(nn.Module):
    """No compression: the latent is the scan itself, so that the other stages work in voxel space."""

    strides = (1, 1, 1)
    mean_latent = None

    def __init__(self, latent_channels: int = 1) -> None:
        super().__init__()
        self.latent_channels = latent_channels

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x itself, and a standard deviation of 0."""
        return x, torch.zeros_like(x)

    def decode(self, z: Tensor) -> Tensor:
        """z itself."""
        return z

    def enable_checkpointing(self) -> None:
        """Does nothing, because there are no activations to recompute."""
