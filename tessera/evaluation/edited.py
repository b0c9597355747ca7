"""Metrics of edited test images: what each edit is worth beside what anybody could do without a prior.

Each is a mean over seeds: the share of images whose class the edit was to show, by a feature network; the Frechet distance
to the test images; the peak signal-to-noise ratio to the originals where the edit was allowed to change them; the number of
known pixels that changed, which should be none; and how far apart the results of two seeds are.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tessera.artifacts import bit_depth
from tessera.artifacts.images import to_uint8
from tessera.components import sets
from tessera.editing.trial import Trial
from tessera.evaluation.figures import Recorder, without_network
from tessera.evaluation.judge import Judge
from tessera.evaluation.reference import Reference
from tessera.metrics import frechet

IMAGES = "edited test images"  # in the protocols
MOST_DB = 100.0  # of images that are equal


class EditMetrics:
    """Records the figures of edits and of their baselines: groups EDIT and EDIT/BASELINE of `found`."""

    def __init__(
        self, found: Recorder, features: Path, reference: Path, networks: list[str], dataset: str, num_seeds: int
    ):
        """networks: names of the feature networks, each an artifact below `features` and one below `reference`."""
        self.found, self.dataset, self.num_seeds = found, dataset, num_seeds
        self.judges = {name: Judge.read(features / name, name) for name in networks}
        self.references = {name: Reference(reference / name) for name in networks}

    def record(self, edit: str, originals: Tensor, trials: list[Trial]) -> None:
        """originals: (B, C, H, W) in [-1, 1], on the CPU; one trial of them for each seed."""
        first = trials[0]
        self._add(edit, originals, [trial.edited for trial in trials], first)
        for name in first.baselines:
            self._add(f"{edit}/{name}", originals, [trial.baselines[name] for trial in trials], first)
        protocol = without_network(self.dataset, IMAGES, len(originals), num_seeds=self.num_seeds)
        if first.mask is not None:
            is_known = ~first.mask.unsqueeze(1).expand_as(originals)
            changed = sum(int((trial.edited != originals)[is_known].sum()) for trial in trials)
            self.found.add(edit, "changed_known_pixels", changed, protocol)
        if len(trials) > 1:
            between = (trials[0].edited - trials[1].edited).abs() / 2
            self.found.add_mean(edit, "diversity", mean_where(between, first.mask), protocol)

    def _add(self, group: str, originals: Tensor, edited: list[Tensor], trial: Trial) -> None:
        num_images, seeds = len(originals), {"num_seeds": self.num_seeds}
        pixels = [to_uint8(each).cpu().numpy() for each in edited]
        if sets(self, "bits"):  # of the images, as edit_images says
            pixels = [bit_depth.stored(each, self).cpu().numpy() for each in edited]
        classifier = next((name for name, judge in self.judges.items() if judge.has_logits), None)
        if classifier is not None and trial.labels is not None:
            agrees = [self.judges[classifier].agrees(each, trial.labels.numpy()).mean() for each in pixels]
            protocol = self.references[classifier].protocol_of("test", IMAGES, num_images, 0, **seeds)
            self.found.add_share(group, "label_agreement", float(np.mean(agrees)), protocol)
        for name, judge in self.judges.items():
            other = self.references[name].moments("test")
            distances = [frechet.distance(frechet.moments(judge.features(each)), other) for each in pixels]
            protocol = self.references[name].protocol("test", IMAGES, num_images, **seeds)
            self.found.add(group, judge.frechet_name, float(np.mean(distances)), protocol)
        protocol = without_network(self.dataset, IMAGES, num_images, **seeds)
        errors = torch.stack([mean_where((each - originals).square() / 4, trial.mask) for each in edited]).mean(dim=0)
        self.found.add_mean(group, "edit_psnr_db", (-10 * errors.log10()).clamp_max(MOST_DB), protocol)


def mean_where(values: Tensor, mask: Tensor | None) -> Tensor:
    """(B,) float64 means of (B, C, H, W) values, of those in the (B, H, W) mask if there is one."""
    values = values.double().mean(dim=1)
    if mask is None:
        return values.mean(dim=(1, 2))
    return (values * mask).sum(dim=(1, 2)) / mask.sum(dim=(1, 2)).clamp_min(1)
