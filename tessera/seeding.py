"""Named random generators: a seed and a purpose give a generator, so no act of chance depends on another's history.

A training step seeds itself from (seed, purpose, step); therefore a resumed run needs no saved generator state to
equal an uninterrupted one (the scheme of NVlabs/edm2, there by image count).
"""

import hashlib

import numpy as np
import torch


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, e.g. derive(0, "train_prior", step)."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *purpose: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator for one purpose, on the device of the tensors that it draws for: no noise is then copied to them.

    What it draws depends on the kind of device: a GPU's generator is another than the CPU's (Philox; Mersenne Twister).
    """
    return torch.Generator(device).manual_seed(derive(seed, *purpose))


def numpy_generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A numpy generator for one purpose."""
    return np.random.default_rng(derive(seed, *purpose))
