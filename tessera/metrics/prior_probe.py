"""How easily tokens are modelled: the loss on test images of small priors, alike for every tokenizer, after a short training.

Reconstructions do not show it: rFD hardly tells which tokenizer a prior will draw well with (Xu et al., 2026,
arXiv:2603.05630). Of latents, standardized per channel, a flow learns the velocity x_1 - x_0 from x_t = (1 - t) x_0 + t x_1 and
the label, with noise x_0. `probe_loss` is its squared error at even times, as a share of what is left if latents were white
normal noise: then the best guess from x_t leaves a variance of

    V(t) = 1 / ((1 - t)^2 + t^2)

of each value, since x_1 - x_0 has variance 2 and covariance 2 t - 1 with x_t, whose variance is (1 - t)^2 + t^2. So 1 is the
worst that latents can be, whatever their number, and less is what their places, channels and labels tell of each other. Of
indices an autoregressive transformer learns the next one; `probe_bits_per_image` is its -log2 of the probability of an image.

Sources: Lipman et al., "Flow Matching for Generative Modeling", 2022, arXiv:2210.02747, equation 23 at sigma_min = 0 (loss);
Zhong et al., "Diffusing in the Right Space", 2026, arXiv:2606.03578 (its part that no network can learn, the velocity's
variance given x_t, goes with the quality of samples); Esser et al., 2021, arXiv:2012.09841, section 3.2 (bits).
Differs from them: a small network stands in for the best one, so that its error is part of the figure; V(t) is the unit.
"""

from typing import Any, Literal, Protocol

import numpy as np

from tessera.components import AddedKey, Params
from tessera.contracts import Count, Record, Shown

FIGURES = (
    Shown("probe_loss", better="lower", has_error=True),
    Shown("probe_bits_per_image", "{:.1f}", has_error=True),
)


class Config(Params):
    kind: Literal["prior_probe"]
    probe_steps: AddedKey[Count] = 300  # of the training of each probe


class Probe(Protocol):
    """Trains them, when it is asked: a network, a training and noise that are the same for every tokenizer."""

    times: np.ndarray  # (T,) from 0, noise, to 1, latents

    def velocity_errors(
        self, num_steps: int
    ) -> np.ndarray | None: ...  # (N, T) of a flow, of each test image at these times
    def bits(
        self, num_steps: int
    ) -> np.ndarray | None: ...  # (N,) of each test image's indices; None without a codebook
    def protocol(self, **settings: Any) -> Any: ...


def of_probe(config: Config, probe: Probe, found: Record) -> None:
    """`probe_loss` where latents are stored, `probe_bits_per_image` where there is a codebook."""
    protocol = probe.protocol(probe_steps=config.probe_steps)
    errors = probe.velocity_errors(config.probe_steps)
    if errors is not None:
        found.add_mean("probe_loss", (errors / unexplained(probe.times)).mean(axis=1), protocol)
    bits = probe.bits(config.probe_steps)
    if bits is not None:
        found.add_mean("probe_bits_per_image", bits, protocol)


def unexplained(times: np.ndarray) -> np.ndarray:
    """V(t): the variance of x_1 - x_0 given x_t, of independent standard normal x_0 and x_1."""
    return 1 / ((1 - times) ** 2 + times**2)
