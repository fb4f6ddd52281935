"""Is y used? What y adds to the prediction of z_0, and what of a scan can be decoded from y alone.

A probe cannot tell: y may predict a diagnosis while the decoder ignores it. The error of z_0, the mean over voxels of
(z_0 predicted - z_0)^2 in units of the latent's variance, is compared at the same noise with the scan's own y, with
another subject's, and without guidance. Another's y must be worse than one's own where it matters: at high noise.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldae.data.subsampling import subsample_by_subject
from ldae.diffusion.process import add_noise, eps_to_z0
from ldae.evaluation import figures
from ldae.evaluation.context import Context, iterate_batches
from ldae.evaluation.edits.anatomy import STRUCTURES, SoftVolume, build_soft_volume, read_true_volumes
from ldae.evaluation.images.image_metrics import brain_mask, copy_to_host, ssim_whole_and_masked
from ldae.evaluation.probes import scores
from ldae.evaluation.probes.bootstrap import draw_subject_weights, summarise
from ldae.utils.seeding import draw_normal

log = logging.getLogger(__name__)

BANDS = 5
KINDS = ("own", "other", "none")


def band_name(kind: str, band: int) -> str:
    """`own_t800` for the band that starts at 0.8 T."""
    return f"{kind}_t{band * 1000 // BANDS:03d}"


@torch.no_grad()
def measure_z0_errors(
    denoiser: Any, z0: Tensor, own: Tensor, other: Tensor, seed: int, keys: Sequence[int], points: int = 2
) -> dict[str, Tensor]:
    """Error of z_0 of every scan by kind of y and band of t: names as `band_name`, (B,) each on the device of z0.

    Args:
        denoiser: a Denoiser (`schedule`, `eps(z_t, t)`, `guided_eps(y) -> eps_fn`).
        z0: (B, C, X, Y, Z) unit-variance latents.
        own, other: (B, dim), the scans' own y and other subjects'.
        keys: one a scan; its noise depends on (seed, key, t) alone.
        points: timesteps in each of the five bands, at the middles of equal parts.
    """
    schedule, count = denoiser.schedule, BANDS * points
    times = [int((place + 0.5) * schedule.timesteps / count) for place in range(count)]
    found = {band_name(kind, band): torch.zeros(len(z0), device=z0.device) for kind in KINDS for band in range(BANDS)}
    for place, step in enumerate(times):
        t = torch.full((len(z0),), step, device=z0.device)
        noise = draw_normal(z0.shape[1:], seed, keys, f"z0_error/{step}").to(z0)
        z_t = add_noise(schedule, z0, noise, t)
        twice = denoiser.guided_eps(torch.cat([own, other]))(torch.cat([z_t, z_t]), torch.cat([t, t]).float())
        for kind, eps in zip(KINDS, (*twice.chunk(2), denoiser.eps(z_t, t.float())), strict=True):
            error = (eps_to_z0(schedule, eps.to(z_t.dtype), z_t, t) - z0).float().square().flatten(1).mean(1)
            found[band_name(kind, place // points)] += error / points
    return found


def measure_z0_errors_of_scan(
    denoiser: Any, z0: Tensor, own: Tensor, other: Tensor, seed: int, key: int
) -> dict[str, Tensor]:
    """`z0_error/{own,other,none}_t{000,200,400,600,800}` of one scan (B = 1), for a training's validation.

    Scalars on the device of z0; nothing is read back.
    """
    table = measure_z0_errors(denoiser, z0, own, other, seed, [key])
    return {f"z0_error/{name}": values.mean() for name, values in table.items()}


def pair_with_other_subjects(subjects: Sequence[str]) -> np.ndarray | None:
    """For each scan the position of one of another subject; each scan is taken once. None if that cannot be had.

    Scans sorted by subject and shifted by the longest run of one subject: no scan lands on its own subject.
    """
    order = np.argsort(np.asarray(subjects, dtype=str), kind="stable")
    longest = int(np.unique(np.asarray(subjects, dtype=str), return_counts=True)[1].max())
    if 2 * longest > len(order):
        return None
    partner = np.empty(len(order), dtype=int)
    partner[order] = np.roll(order, -longest)
    return partner


class Semantics:
    """`semantics/...` on test scans, with intervals over subjects.

    - `z0_error/{own,other,none}`: mean for t >= 0.8 T; `..._t000` to `..._t800` by band; `z0_error_ratio`: other / own.
    - `ssim`, `ssim_mask`: decoding from y alone (z_T fixed noise) against the scan; `..._autoencoder`: against
      the autoencoder's reconstruction.
    - `ventricle_r`: Pearson's r of the decoded scan's volume (anatomy.py) with the scan's own; `..._control`: the same
      with ANOTHER subject's decoded scan and the own intensity levels, near 0 unless the measure itself gives the
      answer away.
    """

    def __init__(
        self,
        scans: int | None = None,
        batch_size: int = 8,
        points: int = 2,
        resamples: int = 1000,
        structures: Sequence[str] = ("ventricle",),
    ):
        """`scans` at most (None: all of test); `points` timesteps in each band; `structures` of anatomy.py."""
        self.structures = list(structures)
        self.scans, self.batch_size, self.points, self.resamples = scans, batch_size, points, resamples

    def __call__(self, context: Context) -> Iterator[tuple[str, float]]:
        subjects = context.table["subject"].to_numpy(str)
        rows = subsample_by_subject(context.rows("test"), subjects, self.scans, context.seed)
        partner = pair_with_other_subjects(subjects[rows]) if len(rows) else None
        if partner is None:
            log.warning("semantics are skipped: test needs scans of at least two subjects, none with most of them")
            return
        measures = {name: build_soft_volume(context, STRUCTURES[name]) for name in self.structures}
        if not any(measures.values()):
            log.warning("semantics: the table has no usable label maps (labels_path), volumes are not measured")
        found, volumes = self._all_batches(context, rows, partner, measures)
        weights = draw_subject_weights(subjects[rows], self.resamples, context.seed)
        yield "semantics/scans", float(len(rows))
        yield from self._means(found, weights)
        for name, (decoded, control) in volumes.items():
            truth = read_true_volumes(context, name, rows)
            yield from summarise(f"semantics/{name}_r", scores.pearson(truth, decoded, weights))
            yield f"semantics/{name}_r_control", float(scores.pearson(truth, control, weights[:1])[0])
            figures.draw_scatter(context.out / f"semantics_{name}.png", f"{name} volume", "mm3", truth, decoded)

    def _means(self, found: dict[str, np.ndarray], weights: np.ndarray) -> Iterator[tuple[str, float]]:
        means = {name: weights @ values / weights.sum(1) for name, values in found.items()}
        top = {kind: means[band_name(kind, BANDS - 1)] for kind in KINDS}
        for kind in KINDS:
            yield from summarise(f"semantics/z0_error/{kind}", top[kind])
            for band in range(BANDS):
                name = band_name(kind, band)
                yield f"semantics/z0_error/{name}", float(means.pop(name)[0])
        yield from summarise("semantics/z0_error_ratio", top["other"] / top["own"])
        yield from summarise("semantics/z0_error_ratio_none", top["none"] / top["own"])
        for name, values in means.items():
            yield from summarise(f"semantics/{name}", values)

    def _all_batches(
        self, context: Context, rows: np.ndarray, partner: np.ndarray, measures: dict[str, SoftVolume | None]
    ) -> tuple[dict[str, np.ndarray], dict[str, tuple[np.ndarray, np.ndarray]]]:
        """Per-scan numbers, (N,) each, and decoded and control volumes of each measurable structure."""
        from tqdm import tqdm

        found: dict[str, list[np.ndarray]] = {}
        decoded = np.empty((len(rows), *context.volumes(rows[:1]).shape[2:]), np.float32)
        levels: dict[str, list[Any]] = {name: [] for name, measure in measures.items() if measure is not None}
        chunks = list(iterate_batches(range(len(rows)), self.batch_size))
        for places in tqdm(chunks, "semantics"):
            numbers, images, reconstruction = self._batch(context, rows[places], rows[partner[places]])
            decoded[places] = images
            for name, values in numbers.items():
                found.setdefault(name, []).append(values)
            for name, collected in levels.items():
                shares = context.regions(rows[places].tolist(), STRUCTURES[name])
                collected += [measures[name].levels(r, s) for r, s in zip(reconstruction, shares, strict=True)]
        volumes = {
            name: (
                np.array([measures[name].measure(image, level) for image, level in zip(decoded, own, strict=True)]),
                np.array([measures[name].measure(decoded[partner[i]], level) for i, level in enumerate(own)]),
            )
            for name, own in levels.items()
        }
        return {name: np.concatenate(parts) for name, parts in found.items()}, volumes

    @torch.no_grad()
    def _batch(
        self, context: Context, rows: np.ndarray, others: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """Numbers of these scans, their decodings from y alone, and the autoencoder's reconstructions, (B, X, Y, Z)."""
        model = context.model
        scans = context.volumes(rows.tolist())
        x, mask = scans.to(model.device), brain_mask(scans).to(model.device)
        own, other = (torch.from_numpy(context.embeddings[part]).to(model.device) for part in (rows, others))
        z0 = model.compress(x)
        numbers = measure_z0_errors(model.denoiser, z0, own, other, context.seed, rows.tolist(), self.points)
        noise = draw_normal(z0.shape[1:], context.seed, rows.tolist(), "semantics").to(z0)
        reconstruction, decoded = model.decompress(z0), model.decode(noise, own)
        for against, reference in (("", x), ("_autoencoder", reconstruction)):
            numbers[f"ssim{against}"], numbers[f"ssim_mask{against}"] = ssim_whole_and_masked(decoded, reference, mask)
        return copy_to_host(numbers), decoded[:, 0].float().cpu().numpy(), reconstruction[:, 0].float().cpu().numpy()
