"""Nearest code and a whole training step of the vector quantizer, beside vector-quantize-pytorch.

    python -m benchmarks.quantizer

CPU seconds of one thread, medians of alternating rounds. Compare ratios within one run, not figures between machines.
"""

import statistics
import time
from collections.abc import Callable

import torch
from vector_quantize_pytorch import VectorQuantize

from tessera.nn.nearest import nearest
from tessera.quantizers.vector import Config, Quantizer

CASES = [(1024, 64, 8192), (16_384, 8, 4096), (262_144, 8, 512)]  # codes, channels, tokens
ROUNDS = 7


def medians(*candidates: Callable[[], object]) -> list[float]:
    """Median CPU milliseconds of each, run in turn so that a drifting machine meets all alike."""
    for candidate in candidates:
        candidate()
    seconds: list[list[float]] = [[] for _ in candidates]
    for _ in range(ROUNDS):
        for times, candidate in zip(seconds, candidates, strict=True):
            start = time.process_time()
            candidate()
            times.append(time.process_time() - start)
    return [1000 * statistics.median(times) for times in seconds]


def squared_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.double() - b.double()).square().sum(dim=1)


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread; CPU milliseconds, median of {ROUNDS} alternating rounds")
    for num_codes, width, num_tokens in CASES:
        peer = VectorQuantize(dim=width, codebook_size=num_codes, decay=0.95).eval()
        settings = {"codebook_size": num_codes, "code_dim": width, "init": "uniform"}
        ours = Quantizer(Config(**settings)).eval()
        ours.codebook.copy_(peer._codebook.embed[0].detach())
        z = torch.randn(1, width, num_tokens, 1, generator=torch.Generator().manual_seed(0))
        rows, sequence = z[0, :, :, 0].T.contiguous(), z[:, :, :, 0].transpose(1, 2).contiguous()
        with torch.no_grad():
            chosen, of_peer = ours(z).indices.flatten(), peer(sequence)[1].flatten()
            excess = squared_distance(rows, ours.codebook[chosen]) - squared_distance(rows, ours.codebook[of_peer])
            assert excess.max() < 1e-5  # the same codes, but where two are equally near up to float32's rounding
            bound, search, whole, of_peer = medians(
                lambda rows=rows, codes=ours.codebook: rows @ codes.T,
                lambda rows=rows, codes=ours.codebook: nearest(rows, codes),
                lambda z=z, ours=ours: ours(z),
                lambda sequence=sequence, peer=peer: peer(sequence),
            )
        print(
            f"K={num_codes:<7} D={width:<3} {num_tokens} tokens: matrix product alone {bound:7.1f}, nearest {search:7.1f}, "
            f"forward {whole:7.1f}, peer {of_peer:7.1f}: {of_peer / whole:5.1f}x"
        )
    peer = VectorQuantize(dim=8, codebook_size=1024, decay=0.95, threshold_ema_dead_code=2, kmeans_init=False).train()
    ours = Quantizer(Config(codebook_size=1024, code_dim=8, init="uniform")).train()
    z = torch.randn(64, 8, 8, 8)
    sequence = z.flatten(2).transpose(1, 2).contiguous()
    with torch.no_grad():
        step, of_peer = medians(lambda: ours(z), lambda: peer(sequence))
    print(
        f"training step with averages and revival, K=1024 D=8, 4096 tokens: "
        f"{step:.1f}, peer {of_peer:.1f}: {of_peer / step:.1f}x"
    )


if __name__ == "__main__":
    main()
