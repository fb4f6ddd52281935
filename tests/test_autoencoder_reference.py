"""The autoencoder's mean latent: latents have mean 0 over the scans it was set from, and nothing else changes."""

import torch

from ldae.models.autoencoder import AutoencoderKL

SHAPE = (8, 12, 8)


def build(**options):
    torch.manual_seed(0)
    return AutoencoderKL(channels=(8, 8), residual_blocks=1, latent_channels=2, groups=4, **options).eval()


def test_latents_are_centred_and_reconstructions_unchanged():
    volumes = torch.rand(5, 1, *SHAPE, generator=torch.Generator().manual_seed(1))
    plain, centred = build(), build(mean_latent_for=SHAPE)
    with torch.no_grad():
        raw, std = plain.encode(volumes)
        centred.set_mean_latent(volumes.split(2))
        mean, centred_std = centred.encode(volumes)
        torch.testing.assert_close(mean.mean(0), torch.zeros(mean.shape[1:]), atol=1e-6, rtol=0)
        torch.testing.assert_close(raw - mean, raw.mean(0).expand_as(raw), atol=1e-6, rtol=0)
        torch.testing.assert_close(centred_std, std)
        torch.testing.assert_close(centred.decode(mean), plain.decode(raw))
        # `forward`, which is trained, does not use it.
        torch.testing.assert_close(centred(volumes)[0], plain(volumes)[0])
        torch.testing.assert_close(centred(volumes)[1], raw)
    assert raw.mean(0).abs().max() > 1e-3
    # Setting it again starts from the posterior's own mean, not from the centred one.
    before = centred.mean_latent.clone()
    centred.set_mean_latent(volumes.split(5))
    torch.testing.assert_close(centred.mean_latent, before)
    assert "reference" in centred.state_dict()
    assert "reference" not in plain.state_dict()
