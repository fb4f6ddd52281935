"""What a later visit is predicted to be, by our forecast and by plain baselines, in model space.

    ldae         the scan plus the change that the forecast decodes (ldae.editing.forecaster), as `ldae forecast` does
    decoded      the decoded forecast alone
    last         the scan itself
    mean_change  the scan plus the population's mean change of each voxel a year
    latent       the scan plus the change of the autoencoder's latents, learned as that of y is (after arXiv 2508.19482)
    extrapolated the scan plus the change of its latents from the visit before, continued; where there is one
    interpolated the blend of the scan and a visit after the predicted one; where there is one. It has seen the future.

Everything is learned from training subjects.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldae.editing.forecast_fit import FittedForecast, VisitPairs, find_coordinates, fit_rates
from ldae.evaluation.context import Context, iterate_batches
from ldae.evaluation.edits.edited_scans import add_change

BATCH = 16


@dataclass(frozen=True)
class LearnedBaselines:
    """Baselines that are fitted on the training pairs.

    Attributes:
        mean_change: of a voxel a year, (1, 1, X, Y, Z).
        centre, basis, unit, rate: of the latents, as in Forecaster.
        fitted: the forecast, whose pairs and columns are used.
    """

    mean_change: Tensor
    centre: np.ndarray
    basis: np.ndarray
    unit: float
    rate: np.ndarray
    fitted: FittedForecast

    @classmethod
    @torch.no_grad()
    def fit(cls, context: Context, fitted: FittedForecast, rows: np.ndarray) -> "LearnedBaselines":
        """Fit them on the pairs of `fitted`, the latents' directions on all training rows."""
        pairs, model = fitted.pairs, context.model
        total: Tensor | None = None
        for part in iterate_batches(range(len(pairs)), BATCH):
            change = context.volumes(pairs.second[part].tolist()) - context.volumes(pairs.first[part].tolist())
            weighted = torch.einsum("b,bcxyz->cxyz", torch.from_numpy(pairs.years[part]).to(change), change)[None]
            total = weighted if total is None else total + weighted
        mean_change = total / float(np.sum(pairs.years**2))  # least squares of change = years * mean
        latents = {
            row: z
            for part in iterate_batches(rows, BATCH)
            for row, z in zip(part, model.compress(context.volumes(part)).flatten(1).cpu().numpy(), strict=True)
        }
        centre, basis, unit = find_coordinates(np.stack([latents[row] for row in rows.tolist()]))
        first, second = (np.stack([latents[int(row)] for row in side]) for side in (pairs.first, pairs.second))
        moved = (second - first).astype(np.float64) @ basis / unit
        found = cls(mean_change.to(model.device), centre, basis, unit, np.zeros((1, 1)), fitted)
        features = found.features(context, first, pairs.first)
        rate = fit_rates(moved, pairs, features, basis.shape[1], context.seed).rate
        return cls(found.mean_change, centre, basis, unit, rate, fitted)

    def features(self, context: Context, z: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """1, the coordinates of flattened latents z (N, D), and the columns of their rows."""
        table = context.table.iloc[rows].reset_index(drop=True)
        columns = [one.encode(table[one.column]) for one in self.fitted.forecaster.covariates]
        coordinates = (z.astype(np.float64) - self.centre) @ self.basis / self.unit
        return np.concatenate([np.ones((len(z), 1)), coordinates, *columns], 1)

    def latent_change(self, context: Context, z: Tensor, row: int, years: np.ndarray) -> Tensor:
        """Change of the latent z (1, C, X', Y', Z') of a row after each of `years` (n,), (n, C, X', Y', Z')."""
        features = self.features(context, z.flatten(1).cpu().numpy(), np.array([row]))
        moved = years[:, None] * self.unit * (features @ self.rate) @ self.basis.T
        return torch.from_numpy(moved).to(z).view(len(years), *z.shape[1:])


@dataclass(frozen=True)
class Visits:
    """One scan and the later visits that are predicted from it.

    Attributes:
        row: of the scan.
        targets, years: rows of the later visits, and how much later they are.
        before, after: row of the last visit before the scan and of the subject's last visit, with the years from the
            scan on; None if there is none.
    """

    row: int
    targets: list[int]
    years: np.ndarray
    before: tuple[int, float] | None
    after: tuple[int, float] | None


def list_visits(pairs: VisitPairs) -> list[Visits]:
    """Every scan that has later visits, in the order of the pairs."""
    found = []
    for row in dict.fromkeys(pairs.first.tolist()):
        own, earlier = pairs.first == row, pairs.second == row
        order = np.argsort(pairs.years[own])
        targets, years = pairs.second[own][order], pairs.years[own][order]
        before = None
        if earlier.any():
            nearest = int(np.argmin(pairs.years[earlier]))
            before = int(pairs.first[earlier][nearest]), -float(pairs.years[earlier][nearest])
        after = (int(targets[-1]), float(years[-1])) if len(targets) > 1 else None
        found.append(Visits(int(row), targets.tolist(), years, before, after))
    return found


@torch.no_grad()
def predict_visits(
    context: Context, fitted: FittedForecast, baselines: LearnedBaselines, visits: Visits
) -> list[dict[str, Tensor]]:
    """The predictions of each target by method, (1, 1, X, Y, Z) each."""
    model = context.model
    x = context.volumes([visits.row]).to(model.device)
    z, years = model.compress(x), visits.years
    reconstructed = model.decompress(z)

    def through_latents(change: Tensor) -> Tensor:
        return add_change(x, model.decompress(z + change) - reconstructed)

    decoded, change = decode_forecasts(context, fitted, visits.row, z, years)
    ahead = torch.from_numpy(years).to(x).view(-1, 1, 1, 1, 1)
    images = {
        "ldae": add_change(x, change),
        "decoded": decoded,
        "last": x.expand(len(years), -1, -1, -1, -1),
        "mean_change": add_change(x, ahead * baselines.mean_change),
        "latent": through_latents(baselines.latent_change(context, z, visits.row, years)),
    }
    if visits.before is not None:
        row, time = visits.before
        rate = (model.compress(context.volumes([row]).to(x)) - z) / time
        images["extrapolated"] = through_latents(ahead * rate)
    found = [{name: image[i : i + 1] for name, image in images.items()} for i in range(len(years))]
    if visits.after is not None:
        last = context.volumes([visits.after[0]]).to(x)
        for one, time in zip(found[:-1], years[:-1], strict=True):
            one["interpolated"] = torch.lerp(x, last, float(time / visits.after[1]))
    return found


def decode_forecasts(
    context: Context,
    fitted: FittedForecast,
    row: int,
    z: Tensor,
    years: np.ndarray,
    deviations: np.ndarray | None = None,
) -> tuple[Tensor, Tensor]:
    """Decoded forecasts of a scan after `years` (n,), and their change from the unedited one, (n, 1, X, Y, Z) each.

    Args:
        z: its latent, (1, C, X', Y', Z').
        deviations: of y from the forecast, (n, D).
    """
    model, forecaster = context.model, fitted.forecaster
    y, table = context.y([row]), context.table.iloc[[row] * len(years)].reset_index(drop=True)
    code = forecaster.editor.invert(model, z, y, context.seed, [row])
    moved = forecaster.change(y.double().cpu().numpy().repeat(len(years), 0), table, years)
    moved = moved if deviations is None else moved + deviations
    images = forecaster.editor.decode(
        model, code[[0] * (1 + len(years))], torch.cat([y, y + torch.from_numpy(moved).to(y)])
    )
    return images[1:], images[1:] - images[:1]
