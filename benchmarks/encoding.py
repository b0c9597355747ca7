"""What the host does for each batch that is encoded: CPU milliseconds of the thread that feeds the device, and of the other.

    python -m benchmarks.encoding [--latents 16x16x16] [--views 2] [--batch 500]

The tokenizer is a stand-in that answers at once: what is left is the host's. "in line": sums, copies and writing on the
thread that encodes, as it was done before. "behind": as stages/encode_tokens.py does it. "behind, sums on the device": the same
without the sums, which an accelerator takes itself.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from stages import encode_tokens
from tessera.artifacts.background import Behind
from tessera.artifacts.growing import Growing

ROUNDS = 12


def measure(
    latents: torch.Tensor, num_views: int, is_behind: bool, has_sums: bool, folder: Path
) -> tuple[float, float]:
    """Median CPU milliseconds per batch: of the thread that encodes, and of the whole process."""
    model = SimpleNamespace(codebook_size=1024, latent_shape=tuple(latents.shape[1:]))
    settings = SimpleNamespace(store_latents=True, latents_dtype="float32")
    written = encode_tokens._Written(Growing(folder, folder / "../record.json", 60.0), settings, model, None)
    indices = torch.randint(1024, (len(latents), *latents.shape[2:]))
    views = (torch.stack([each] * num_views, dim=1) for each in (latents, indices))
    batch = encode_tokens._Batch("train", np.zeros(len(latents), np.int64), *views, None)
    sums_of, own, all_threads = encode_tokens.sums_of, [], []
    if not has_sums:
        encode_tokens.sums_of = lambda some: np.zeros((2, some.shape[2]))
    with Behind() as behind:
        for _ in range(ROUNDS):
            began, together = time.thread_time(), time.process_time()
            if is_behind:
                behind.call(written.add, batch)
            else:
                written.add(batch)
            own.append(time.thread_time() - began)
            all_threads.append(time.process_time() - together)
    encode_tokens.sums_of = sums_of
    return 1000 * statistics.median(own), 1000 * statistics.mean(all_threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", default="16x16x16", help="channels x height x width")
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--batch", type=int, default=500)
    given = parser.parse_args()
    torch.set_num_threads(1)
    shape = tuple(int(side) for side in given.latents.split("x"))
    latents = torch.randn(given.batch, *shape)
    print(f"{given.batch} images x {given.views} views of latents {given.latents}, median of {ROUNDS} batches, CPU ms")
    for name, is_behind, has_sums in (
        ("in line", False, True),
        ("behind", True, True),
        ("behind, sums on the device", True, False),
    ):
        with tempfile.TemporaryDirectory() as place:
            own, together = measure(latents, given.views, is_behind, has_sums, Path(place) / "tokens")
        print(f"  {name:28s} {own:7.2f} of the thread that encodes, {together:7.2f} of all")


if __name__ == "__main__":
    main()
