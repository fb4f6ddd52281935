"""A reference moves the latents, to a mean of zero over the scans it is set from, and nothing else."""

import torch

from ldae.models.autoencoder import AutoencoderKL

SHAPE = (8, 12, 8)


def built(**options):
    torch.manual_seed(0)
    return AutoencoderKL(channels=(8, 8), residual_blocks=1, latent_channels=2, groups=4, **options).eval()


def test_latents_are_centred_and_reconstructions_unchanged():
    volumes = torch.rand(5, 1, *SHAPE, generator=torch.Generator().manual_seed(1))
    plain, centred = built(), built(reference=SHAPE)
    with torch.no_grad():
        raw, std = plain.encode(volumes)
        centred.set_reference(volumes.split(2))
        mean, spread = centred.encode(volumes)
        torch.testing.assert_close(mean.mean(0), torch.zeros(mean.shape[1:]), atol=1e-6, rtol=0)
        torch.testing.assert_close(raw - mean, raw.mean(0).expand_as(raw), atol=1e-6, rtol=0)
        torch.testing.assert_close(spread, std)
        torch.testing.assert_close(centred.decode(mean), plain.decode(raw))
        # What is trained does not see it.
        torch.testing.assert_close(centred(volumes)[0], plain(volumes)[0])
        torch.testing.assert_close(centred(volumes)[1], raw)
    assert raw.mean(0).abs().max() > 1e-3
    # Setting it again starts from the encoder's own mean, not from the last reference.
    before = centred.reference.clone()
    centred.set_reference(volumes.split(5))
    torch.testing.assert_close(centred.reference, before)
    assert "reference" in centred.state_dict()
    assert "reference" not in plain.state_dict()
