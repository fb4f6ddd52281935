"""The semantic prior p(y | labels): a conditional Gaussian, and optionally a diffusion model of what it leaves.

After DiffAE's latent DDIM (arXiv 2111.15640, section on unconditional sampling): y is standardised, and an MLP with
skip connections predicts how noise is removed from it. Here y is whitened in its principal subspace, the network
predicts the difference from what the Gaussian predicts (ldae.prior.conditional_gaussian), and is 0 before training.
Labels are dropped at random in training, so that the network also knows y without labels: classifier-free guidance
(arXiv 2207.12598).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldae.diffusion.process import v_to_eps
from ldae.diffusion.samplers import Multistep
from ldae.diffusion.schedule import cosine
from ldae.models.blocks import full_precision
from ldae.prior.columns import read_columns
from ldae.prior.conditional_gaussian import ConditionalGaussian
from ldae.prior.label_coding import Coded, LabelCoding
from ldae.prior.label_distribution import LabelDistribution
from ldae.prior.network import SkipMlp
from ldae.prior.whitening import Whitening
from ldae.utils.errors import UserError


class SemanticPrior(nn.Module):
    """Draws y (B, dim) given labels (B, C), NaN where they are not known.

    Args:
        dim: width of y.
        columns: what the labels are, each as `Column.to_dict` gives it.
        components: directions of y that are modelled, at most.
        hidden: layers of the network; 0: no network, y is Gaussian given its labels.
        width, dropout: of the network.
        guidance: 1 is p(y | labels); larger values exaggerate what labels change.
        steps: of the sampler.

    Raises:
        UserError: a size is out of bounds.
    """

    def __init__(
        self,
        dim: int,
        columns: Sequence[Mapping[str, Any]],
        components: int = 64,
        hidden: int = 0,
        width: int = 256,
        dropout: float = 0.1,
        guidance: float = 1.0,
        steps: int = 20,
    ) -> None:
        super().__init__()
        for name, value, most in (("components", components, dim), ("width", width, 8192), ("hidden", hidden, 64)):
            if not (name != "hidden") <= value <= most:
                raise UserError(f"model.prior.{name}={value}: choose a number up to {most}")
        self.columns = read_columns(columns)
        self.components, self.guidance = components, guidance
        self.whitening = Whitening(dim, components)
        self.coding = LabelCoding(self.columns)
        self.labels = LabelDistribution(self.columns)
        self.gaussian = ConditionalGaussian(self.coding.width, components)
        conditions = self.coding.width + len(self.columns)
        self.network = SkipMlp(components, conditions, width, hidden, dropout) if hidden else None
        self.schedule, self.sampler = cosine(), Multistep(steps=steps)

    @torch.no_grad()
    def fit(self, y: Tensor, labels: Tensor, weights: Tensor, subjects: int) -> float:
        """Measure everything but the network on training scans.

        Args:
            y: (N, dim).
            labels: (N, C).
            weights: (N,), which add up to 1.
            subjects: number of subjects.

        Returns:
            The share of y's variance in the modelled directions.
        """
        share = self.whitening.fit(y, weights)
        self.coding.fit(labels, weights)
        self.labels.fit(labels, weights, subjects)
        self.gaussian.fit(self.coding(labels).features, self.whitening.whiten(y), weights, subjects)
        return share

    def forward(self, u_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """v predicted from u_t (B, components) at t (B,), given labels (B, C): (B, components)."""
        coded = self.coding(labels)
        v = self.predict_gaussian_v(u_t, t, coded)
        return v if self.network is None else v + self.network(u_t, t, torch.cat(coded, 1))

    def predict_gaussian_v(self, u_t: Tensor, t: Tensor, coded: Coded) -> Tensor:
        """What the Gaussian alone predicts of v, (B, components)."""
        alpha, sigma = (level(t).to(u_t)[:, None] for level in (self.schedule.alpha, self.schedule.sigma))
        return self.gaussian.predict_v(u_t, alpha, sigma, coded.features, coded.given)

    @torch.no_grad()
    def draw(self, noise: Tensor, labels: Tensor, gaussian: bool = False) -> Tensor:
        """y (B, dim) from standard normal noise (B, components).

        Args:
            gaussian: draw from the Gaussian alone, with the same noise.
        """
        with full_precision(noise):
            if self.network is None or gaussian:
                u = self.gaussian.draw(noise, *self._features_and_given(labels))
            else:
                u = self.sampler.sample(lambda u_t, t: self._eps(u_t, t, labels), noise, self.schedule)
            return self.whitening.unwhiten(u)

    def _features_and_given(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        coded = self.coding(labels)
        return coded.features, coded.given

    def _eps(self, u_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Guided eps, (B, components)."""
        v = self(u_t, t, labels)
        if self.guidance != 1:
            free = self(u_t, t, torch.full_like(labels, torch.nan))
            v = free + self.guidance * (v - free)
        return v_to_eps(self.schedule, v, u_t, t)
