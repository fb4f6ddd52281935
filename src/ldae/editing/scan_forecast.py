"""The forecast of one scan: its y moved over the years, decoded from the scan's own code, with its uncertainty."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ldae.editing.editor import EditableModel
from ldae.editing.forecaster import Forecaster
from ldae.utils.errors import UserError

NEEDED = "age"  # without it no forecast is made by a model that reads it


@dataclass(frozen=True)
class ScanForecast:
    """What a scan is expected to become.

    Attributes:
        years: from the scan on.
        change: of the intensities in model space, (1, 1, X, Y, Z).
        deviation: standard deviation of the change over random draws of the residuals, of that shape; None without.
        volumes: by structure, its volume over the present one: forecast, and both ends of the 95 % interval.
    """

    years: float
    change: Tensor
    deviation: Tensor | None
    volumes: dict[str, tuple[float, float, float]]


def parse_row(forecaster: Forecaster, given: Mapping[str, str | float]) -> pd.DataFrame:
    """One row of a table with what is known about a scan; columns that are not given count as missing.

    Raises:
        UserError: a column is not read by this forecast, a value cannot be, or the age is needed and missing.
    """
    known = {one.column: one for one in forecaster.covariates}
    for column in given:
        if column not in known:
            names = ", ".join(known) or "none"
            raise UserError(f"{column}: this model's forecast does not read that column; it reads {names}")
    if NEEDED in known and NEEDED not in given:
        raise UserError("this model's forecast depends on the age at the scan: give it (--age YEARS)")
    return pd.DataFrame({column: [known[column].parse(str(value))] for column, value in given.items()}, index=[0])


def check_years(years: Sequence[float]) -> None:
    """Refuse times that are no time ahead.

    Raises:
        UserError: one is not positive or not finite, or there is none.
    """
    for value in years:
        if not (np.isfinite(value) and value > 0):
            raise UserError(f"years (--years): {value:g} is no time ahead: give positive numbers, as in 1,2,5")
    if not years:
        raise UserError("years (--years): give at least one, as in 1,2,5")


@torch.no_grad()
def forecast_scan(
    model: EditableModel,
    forecaster: Forecaster,
    z: Tensor,
    y: Tensor,
    row: pd.DataFrame,
    years: Sequence[float],
    draws: int,
    seed: int,
) -> Iterator[ScanForecast]:
    """Forecasts of one scan after each of `years`; it is inverted once.

    Args:
        z, y: latent (1, C, X', Y', Z') and semantic vector (1, dim) of the scan.
        row: of the table, see `parse_row`.
        draws: random draws for the deviation; 0: none.
    """
    own, editor = y.detach().double().cpu().numpy(), forecaster.editor
    code = editor.invert(model, z, y, seed, [0])
    start = editor.decode(model, code, y)

    def decoded(moved: np.ndarray) -> Tensor:
        return editor.decode(model, code, y + y.new_tensor(moved)) - start

    for time in years:
        ahead = np.array([float(time)])
        moved = forecaster.change(own, row, ahead)
        deviation = None
        if draws:
            drawn = [decoded(moved + deviating) for deviating in forecaster.draw(float(time), draws, seed)]
            deviation = torch.stack(drawn).std(0)
        features = forecaster.features(own, row)
        volumes = {name: tuple(one.ratio(features, ahead)[0].tolist()) for name, one in forecaster.volumes.items()}
        yield ScanForecast(float(time), decoded(moved), deviation, volumes)


def describe_volumes(volumes: Mapping[str, tuple[float, float, float]]) -> str:
    """ "ventricle +12.0 % [+3.1, +22.0], hippocampus -4.0 % [-8.0, +0.2]"; empty without any."""
    parts = []
    for name, ratios in volumes.items():
        value, low, high = (100 * (ratio - 1) for ratio in ratios)
        parts.append(f"{name} {value:+.1f} % [{low:+.1f}, {high:+.1f}]")
    return ", ".join(parts)
