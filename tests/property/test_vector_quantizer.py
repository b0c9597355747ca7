"""The mathematics of the vector quantizer, against brute force and closed forms."""

import pytest
import torch
import torch.nn.functional as F

from tessera.quantizers import vector
from tessera.quantizers.vector import Config, Quantizer, nearest


def make(**settings) -> Quantizer:
    torch.manual_seed(0)
    return Quantizer(Config(**{"codebook_size": 12, "code_dim": 5, "init": "uniform", "revive_below": 0.0, **settings}))


@pytest.mark.parametrize(
    ("rows", "codes", "width"), [(1, 2, 1), (300, 7, 3), (1000, 1024, 8), (37, 40_000, 4), (5, 100_003, 2)]
)
def test_the_nearest_code_is_really_nearest(rows, codes, width):
    z, codebook = torch.randn(rows, width), torch.randn(codes, width)
    distances = torch.cdist(z.double(), codebook.double())  # brute force
    chosen = distances.gather(1, nearest(z, codebook).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(chosen, distances.min(dim=1).values, atol=1e-5, rtol=0)


def test_commitment_weight_acts_on_the_encoder_only():
    """||z - sg(e)||^2 has beta, ||sg(z) - e||^2 has not: taming-transformers has it the wrong way round."""
    z = torch.randn(2, 5, 3, 2)
    gradients = {}
    for beta in (0.0, 1.0):
        quantizer = make(update="gradient", commitment_weight=beta)
        latents = z.clone().requires_grad_()
        quantizer(latents).loss.backward()
        gradients[beta] = (latents.grad, quantizer.codebook.grad)
    assert gradients[0.0][0].abs().max() == 0 and gradients[1.0][0].abs().max() > 0
    assert torch.equal(gradients[0.0][1], gradients[1.0][1]) and gradients[0.0][1].abs().max() > 0


def test_the_losses_have_their_closed_form():
    quantizer = make(update="gradient", commitment_weight=0.25, codebook_weight=2.0).eval()
    z = torch.randn(2, 5, 3, 2)
    quantized = quantizer(z)
    squared = (z - quantizer.indices_to_codes(quantized.indices)).square().mean()
    torch.testing.assert_close(quantized.loss, 2.25 * squared)


def test_the_moving_average_is_that_of_the_paper():
    """Appendix A.1, equations 6 to 8, with Laplace smoothing, written out code by code."""
    quantizer = make(ema_decay=0.9)
    counts, sums = quantizer.code_counts.clone(), quantizer.code_sums.clone()
    z = torch.randn(4, 5, 3, 2)
    flat = z.permute(0, 2, 3, 1).reshape(-1, 5)
    indices = torch.cdist(flat, quantizer.codebook).argmin(dim=1)
    quantizer.train()(z)
    for code in range(12):
        served = flat[indices == code]
        counts[code] = 0.9 * counts[code] + 0.1 * len(served)
        sums[code] = 0.9 * sums[code] + 0.1 * served.sum(dim=0)
    smooth = (counts + 1e-5) / (counts.sum() + 12 * 1e-5) * counts.sum()
    torch.testing.assert_close(quantizer.codebook, sums / smooth.unsqueeze(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(quantizer.code_counts, counts)


def test_codes_that_serve_nobody_move_onto_latents_of_the_batch():
    quantizer = make(revive_below=0.03, ema_decay=0.5).train()
    quantizer.codebook.fill_(100.0)  # far away from every latent, but for one
    quantizer.codebook[3] = 0.0
    quantizer.code_sums.copy_(quantizer.codebook)
    z = torch.randn(8, 5, 2, 2)
    for _ in range(10):
        quantizer(z)
    flat = z.permute(0, 2, 3, 1).reshape(-1, 5)
    assert quantizer.codebook.abs().max() < flat.abs().max() + 0.1
    assert len(quantizer(z).indices.unique()) > 8


def test_codes_start_from_latents_after_the_waiting_steps():
    quantizer = make(init="data", init_step=2).train()
    z = torch.randn(8, 5, 2, 2) + 50
    for _ in range(2):
        assert torch.equal(quantizer(z).codes, z)  # not quantized yet
    assert quantizer.codebook.abs().max() < 1
    assert not torch.equal(quantizer(z).codes, z)
    assert (quantizer.codebook - 50).abs().max() < 6


def test_normalized_codes_lie_on_the_unit_sphere():
    quantizer = make(normalize_codes=True).eval()
    codes = quantizer(torch.randn(2, 5, 3, 2) * 7).codes
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(2, 3, 2))


def test_distances_are_float32_under_bf16_autocast():
    quantizer = make(update="gradient", codebook_size=512).eval()
    z = torch.randn(4, 5, 8, 8) * 0.01
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(z).indices, quantizer(z.clone()).indices)
        assert quantizer(z).codes.dtype == torch.float32
        under = quantizer(z).indices
    assert torch.equal(under, quantizer(z).indices)


def test_memory_of_the_search_does_not_grow_with_the_product_of_rows_and_codes():
    z, codebook = torch.randn(4096, 8), torch.randn(16_384, 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        nearest(z, codebook)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 2 * vector.CHUNK_BYTES < 4096 * 16_384 * 4


def test_indices_and_codes_agree_with_the_peer_library():
    peer = pytest.importorskip("vector_quantize_pytorch").VectorQuantize(dim=5, codebook_size=12, decay=0.9)
    ours = make(ema_decay=0.9).eval()
    peer._codebook.embed.data.copy_(ours.codebook.unsqueeze(0))
    peer.eval()
    z = torch.randn(3, 5, 4, 2)
    codes, indices, _ = peer(z.permute(0, 2, 3, 1).reshape(3, 8, 5))
    quantized = ours(z)
    assert torch.equal(indices.view(3, 4, 2), quantized.indices)
    torch.testing.assert_close(codes.view(3, 4, 2, 5).permute(0, 3, 1, 2), quantized.codes)


def test_training_pulls_codes_towards_clusters():
    """Three clusters, four codes: after training, each cluster's centre is a code (k-means by moving averages)."""
    torch.manual_seed(1)
    centres = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
    quantizer = Quantizer(Config(codebook_size=4, code_dim=2, init_step=0, ema_decay=0.8)).train()
    for _ in range(100):
        z = centres[torch.randint(3, (64,))] + 0.1 * torch.randn(64, 2)
        quantizer(z.view(64, 2, 1, 1))
    nearest_code = torch.cdist(centres, quantizer.codebook).min(dim=1).values
    assert nearest_code.max() < 0.2
    assert F.mse_loss(quantizer.eval()(centres.view(3, 2, 1, 1)).codes.view(3, 2), centres) < 0.05
