"""Does the decoder use y? How much y improves the prediction of z_0, and what can be decoded from y alone.

A probe cannot tell: y may predict a diagnosis although the decoder ignores it. The error of z_0 is the mean over voxels
of (predicted z_0 - z_0)^2, in units of the latent's variance. At the same noise it is measured with the scan's own y,
with another subject's y, and without guidance. If y is used, another subject's y must be worse, at high noise.

Metrics on test scans, with intervals over subjects:

- `semantics/z0_error/{own,other,none}`: mean error for t >= 0.8 T; `..._t000` to `..._t800`: by band of t.
- `semantics/z0_error_ratio`: other / own; `semantics/z0_error_ratio_none`: none / own.
- `semantics/ssim`, `semantics/ssim_mask`: scans decoded from y alone (z_T is fixed noise), against the scan;
  `..._autoencoder`: against the autoencoder's reconstruction.
- `semantics/<structure>_r`: Pearson's r of a structure's volume in the decoded scan (edits/anatomy.py) with the true
  one; `..._r_control`: the same with another subject's decoded scan and the own intensity levels, near 0 unless the
  measurement itself gives the answer away.
- `semantics/scans`: how many test scans there were.

semantics_<structure>.png shows decoded against true volumes.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ldae.denoiser import Denoiser
from ldae.diffusion.process import add_noise, eps_to_z0
from ldae.evaluation import figures
from ldae.evaluation.context import Context, iterate_batches
from ldae.evaluation.edits.anatomy import STRUCTURES, Levels, SoftVolume, build_soft_volume, read_true_volumes
from ldae.evaluation.images.image_metrics import brain_mask, copy_to_host, ssim_whole_and_masked, to_arrays
from ldae.evaluation.probes import scores
from ldae.evaluation.probes.bootstrap import draw_subject_weights, summarise, summarise_mean
from ldae.utils.seeding import draw_normal

BANDS = 5  # equal parts of the noise schedule
KINDS = ("own", "other", "none")  # whose y guides the prediction


def band_name(kind: str, band: int) -> str:
    """`own_t800` for the band that starts at 0.8 T."""
    return f"{kind}_t{band * 1000 // BANDS:03d}"


@torch.no_grad()
def measure_z0_errors(
    denoiser: Denoiser, z0: Tensor, own: Tensor, other: Tensor, seed: int, keys: Sequence[int], points: int = 2
) -> dict[str, Tensor]:
    """Error of z_0 of every scan, by kind of y and band of t (`band_name`); (B,) each, on the device of z0.

    Args:
        z0: (B, C, X, Y, Z), latents of unit variance.
        own, other: (B, dim), the scans' own y and other subjects'.
        keys: one per scan; its noise depends on (seed, key, t) only.
        points: timesteps per band, at the middles of equal parts.
    """
    schedule, count = denoiser.schedule, BANDS * points
    errors = {band_name(kind, band): torch.zeros(len(z0), device=z0.device) for kind in KINDS for band in range(BANDS)}
    for point in range(count):
        step = int((point + 0.5) * schedule.timesteps / count)
        t = torch.full((len(z0),), step, device=z0.device)
        z_t = add_noise(schedule, z0, draw_normal(z0.shape[1:], seed, keys, f"z0_error/{step}").to(z0), t)
        guided = denoiser.guided_eps(torch.cat([own, other]))(torch.cat([z_t, z_t]), torch.cat([t, t]).float())
        for kind, eps in zip(KINDS, (*guided.chunk(2), denoiser.eps(z_t, t.float())), strict=True):
            error = (eps_to_z0(schedule, eps.to(z_t.dtype), z_t, t) - z0).float().square().flatten(1).mean(1)
            errors[band_name(kind, point // points)] += error / points
    return errors


def measure_z0_errors_of_scan(
    denoiser: Denoiser, z0: Tensor, own: Tensor, other: Tensor, seed: int, key: int
) -> dict[str, Tensor]:
    """`z0_error/{own,other,none}_t{000,200,400,600,800}` of one scan (B = 1), for the validation of a stage.

    Scalars on the device of z0, which is not waited for.
    """
    errors = measure_z0_errors(denoiser, z0, own, other, seed, [key])
    return {f"z0_error/{name}": values.mean() for name, values in errors.items()}


def pair_with_other_subjects(subjects: Sequence[str]) -> np.ndarray | None:
    """For each scan the position of a scan of another subject, each used once; None if that is impossible.

    Scans are sorted by subject and shifted by the largest number of scans of a subject.
    """
    order = np.argsort(np.asarray(subjects, dtype=str), kind="stable")
    most = int(np.unique(np.asarray(subjects, dtype=str), return_counts=True)[1].max())
    if 2 * most > len(order):
        return None
    partner = np.empty(len(order), dtype=int)
    partner[order] = np.roll(order, -most)
    return partner


class Semantics:
    """The evaluation that the module describes.

    Args:
        scans: at most this many test scans; None: all of them.
        points: timesteps per band.
        structures: whose volumes are measured, see edits/anatomy.py.
    """

    def __init__(
        self,
        scans: int | None = None,
        batch_size: int = 8,
        points: int = 2,
        resamples: int = 1000,
        structures: Sequence[str] = ("ventricle",),
    ):
        self.structures = list(structures)
        self.scans, self.batch_size, self.points, self.resamples = scans, batch_size, points, resamples

    def __call__(self, context: Context) -> Iterator[tuple[str, float]]:
        rows = context.sample_rows("test", self.scans)
        partner = pair_with_other_subjects(context.subjects(rows)) if len(rows) else None
        if partner is None:
            context.skip("semantics is skipped: test needs two subjects, none of them with more than half of the scans")
            return
        measures = {name: build_soft_volume(context, STRUCTURES[name]) for name in self.structures}
        measures = {name: measure for name, measure in measures.items() if measure is not None}
        if not measures:
            context.skip("semantics: the table has no usable label maps (labels_path), volumes are not measured")
        found, decoded, levels = self._measure(context, rows, partner, measures)
        weights = draw_subject_weights(context.subjects(rows), self.resamples, context.seed)
        yield "semantics/scans", float(len(rows))
        yield from _summarise_scans(found, weights)
        for name, measure in measures.items():
            truth = read_true_volumes(context, name, rows)
            own = np.array([measure.measure(image, level) for image, level in zip(decoded, levels[name], strict=True)])
            pairs = zip(decoded[partner], levels[name], strict=True)
            control = np.array([measure.measure(image, level) for image, level in pairs])
            yield from summarise(f"semantics/{name}_r", scores.pearson(truth, own, weights))
            yield f"semantics/{name}_r_control", float(scores.pearson(truth, control, weights[:1])[0])
            figures.draw_scatter(context.out / f"semantics_{name}.png", f"{name} volume", "mm3", truth, own)

    def _measure(
        self, context: Context, rows: np.ndarray, partner: np.ndarray, measures: Mapping[str, SoftVolume]
    ) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, list[Levels]]]:
        """Metrics per scan, (N,) each; scans decoded from y, (N, X, Y, Z); intensity levels by structure."""
        from tqdm import tqdm

        found: dict[str, list[np.ndarray]] = {}
        decoded = np.empty((len(rows), *context.volumes(rows[:1]).shape[2:]), np.float32)
        levels: dict[str, list[Levels]] = {name: [] for name in measures}
        for places in tqdm(list(iterate_batches(range(len(rows)), self.batch_size)), "semantics"):
            metrics, images, reconstruction = self._measure_batch(context, rows[places], rows[partner[places]])
            decoded[places] = images
            for name, values in metrics.items():
                found.setdefault(name, []).append(values)
            for name, measure in measures.items():
                fractions = context.regions(rows[places].tolist(), STRUCTURES[name])
                levels[name] += [measure.levels(r, f) for r, f in zip(reconstruction, fractions, strict=True)]
        return {name: np.concatenate(parts) for name, parts in found.items()}, decoded, levels

    @torch.no_grad()
    def _measure_batch(
        self, context: Context, rows: np.ndarray, others: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """Metrics of these scans, their decodings from y, and the autoencoder's reconstructions, (B, X, Y, Z) each."""
        model, keys = context.model, rows.tolist()
        scans = context.volumes(keys)
        x, mask = scans.to(model.device), brain_mask(scans).to(model.device)
        own, other = context.y(rows), context.y(others)
        z0 = model.compress(x)
        metrics = measure_z0_errors(model.denoiser, z0, own, other, context.seed, keys, self.points)
        noise = draw_normal(z0.shape[1:], context.seed, keys, "semantics").to(z0)
        reconstruction, decoded = model.decompress(z0), model.decode(noise, own)
        for suffix, target in (("", x), ("_autoencoder", reconstruction)):
            metrics[f"ssim{suffix}"], metrics[f"ssim_mask{suffix}"] = ssim_whole_and_masked(decoded, target, mask)
        return copy_to_host(metrics), to_arrays(decoded), to_arrays(reconstruction)


def _summarise_scans(found: Mapping[str, np.ndarray], weights: np.ndarray) -> Iterator[tuple[str, float]]:
    """Means of the metrics (N,), with intervals except for the bands of t."""
    highest = {kind: found[band_name(kind, BANDS - 1)] for kind in KINDS}
    bands = [band_name(kind, band) for kind in KINDS for band in range(BANDS)]
    for kind, values in highest.items():
        yield from summarise_mean(f"semantics/z0_error/{kind}", values, weights)
    for name in bands:
        yield f"semantics/z0_error/{name}", float(found[name].mean())
    means = {kind: weights @ values / weights.sum(1) for kind, values in highest.items()}
    yield from summarise("semantics/z0_error_ratio", means["other"] / means["own"])
    yield from summarise("semantics/z0_error_ratio_none", means["none"] / means["own"])
    for name in (name for name in found if name not in bands):
        yield from summarise_mean(f"semantics/{name}", found[name], weights)
