"""The mathematics of the vector quantizer, against brute force and closed forms."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tessera.nn.nearest import CHUNK_BYTES, DEVICE_BYTES, nearest, nearest_others, others_of
from tessera.quantizers.vector import Config, Quantizer


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


def test_codes_that_serve_stay_where_the_others_move():
    quantizer = make(update="gradient", revive_below=0.03, ema_decay=0.01).train()
    codes = quantizer.codebook.detach().clone()
    quantizer(codes[:4].T.reshape(1, 5, 2, 2))  # a latent on each of four codes; the others serve none
    moved = (quantizer.codebook != codes).any(dim=1)
    assert moved.tolist() == [False] * 4 + [True] * 8


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
    assert 0 < largest <= 2 * CHUNK_BYTES < 4096 * 16_384 * 4


class Launches(TorchDispatchMode):
    """Counts the operations that a device is asked for, views apart, and the bytes of the largest result."""

    number = largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.number += not (function.is_view or function is torch.ops.aten.alias.default)
        self.largest = max(self.largest, *(each.nbytes for each in [found] if isinstance(each, torch.Tensor)), 0)
        return found


@pytest.mark.parametrize(
    ("search", "most"),
    [(nearest, 16), (lambda z, codebook: others_of(codebook, z[:, 0].long(), 8), 80)],
)
def test_a_device_is_asked_for_few_and_bounded_operations(search, most):
    z, codebook = torch.empty(65_536, 8, device="meta"), torch.empty(16_384, 8, device="meta")
    with Launches() as launches:
        search(z, codebook)
    assert 3 < launches.number <= most and launches.largest <= DEVICE_BYTES


@pytest.mark.parametrize("codes", [300, 40_000])
def test_tiles_of_any_size_find_the_same_codes(codes, monkeypatch):
    """What a device searches in one tile, beside what a CPU searches in many."""
    generator = torch.Generator().manual_seed(0)
    z, codebook = torch.randn(1000, 4, generator=generator), torch.randn(codes, 4, generator=generator)
    of_cache = nearest(z, codebook), others_of(codebook, torch.arange(200), 3)
    monkeypatch.setattr("tessera.nn.nearest.CHUNK_BYTES", 2**28)
    monkeypatch.setattr("tessera.nn.nearest.CODES_PER_TILE", 2**28)
    of_device = nearest(z, codebook), others_of(codebook, torch.arange(200), 3)
    assert all(map(torch.equal, of_cache, of_device))


def test_a_million_codes_can_be_searched_and_learned():
    quantizer = Quantizer(Config(codebook_size=2**20, code_dim=8, init_step=0, revive_below=0.0)).train()
    z = torch.randn(1, 8, 3, 2)
    quantizer.eval().codebook.normal_()
    distances = torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, 8).double(), quantizer.codebook.double())
    best = distances.min(dim=1)
    assert torch.equal(quantizer(z).indices.flatten(), best.indices)
    near = quantizer.neighbors(best.indices[:2], 4)
    own = torch.cdist(quantizer.codebook[best.indices[:2]].double(), quantizer.codebook.double())
    assert torch.equal(near, own.topk(5, dim=1, largest=False).indices[:, 1:])
    quantizer.train().batches_seen.fill_(1)
    assert quantizer(z).codes.isfinite().all() and quantizer.codebook.isfinite().all()


def test_neighbors_of_normalized_codes_are_those_on_the_sphere():
    quantizer = make(normalize_codes=True)
    quantizer.codebook.normal_()
    codes = F.normalize(quantizer.codebook, dim=1)
    expected = torch.cdist(codes, codes).topk(4, dim=1, largest=False).indices[:, 1:]
    assert torch.equal(quantizer.neighbors(torch.arange(12), 3), expected)


@pytest.mark.parametrize(("rows", "codes", "count"), [(1, 2, 1), (50, 9, 8), (40, 70_001, 3), (6000, 300, 2)])
def test_the_near_codes_are_really_near(rows, codes, count):
    codebook = torch.randn(codes, 3)
    indices = torch.randint(codes, (rows,))
    found = nearest_others(codebook, indices, count)
    asked, places = indices.unique(return_inverse=True)
    distances = torch.cdist(codebook[asked].double(), codebook.double())
    distances[torch.arange(len(asked)), asked] = torch.inf
    expected = distances.topk(count, dim=1, largest=False).values[places]
    torch.testing.assert_close(distances[places].gather(1, found), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("count", [0, 12])
def test_more_neighbors_than_other_codes_are_refused(count):
    with pytest.raises(ValueError, match=f"{count} neighbors were asked for, but each of 12 codes has 1 to 11 others"):
        make().neighbors(torch.tensor([1]), count)


def test_the_rotation_trick_turns_the_gradient_as_the_latent_turns_into_its_code():
    """Section 4 of arXiv:2410.06424: the codes are lambda R z, and lambda R is constant to the gradient."""
    quantizer = make(rotation_trick=True).eval()
    quantizer.codebook.normal_()
    z = torch.randn(1, 5, 3, 2, requires_grad=True)
    weights = torch.randn_like(z)
    codes = quantizer(z).codes
    torch.testing.assert_close(codes, quantizer.indices_to_codes(quantizer(z).indices), atol=1e-6, rtol=0)
    gradient = torch.autograd.grad((codes * weights).sum(), z)[0]
    for place in range(6):
        latent, code = z.detach().flatten(2)[0, :, place], codes.detach().flatten(2)[0, :, place]
        u, q = latent / latent.norm(), code / code.norm()
        w = (u + q) / (u + q).norm()
        rotation = torch.eye(5) - 2 * torch.outer(w, w) + 2 * torch.outer(q, u)
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(5), atol=1e-5, rtol=0)
        torch.testing.assert_close(rotation @ u, q, atol=1e-5, rtol=0)
        expected = code.norm() / latent.norm() * rotation.T @ weights.flatten(2)[0, :, place]
        torch.testing.assert_close(gradient.flatten(2)[0, :, place], expected, atol=1e-5, rtol=1e-4)


def test_a_latent_of_zero_and_one_opposite_to_its_code_have_finite_gradients_under_rotation():
    quantizer = Quantizer(Config(codebook_size=2, code_dim=2, update="gradient", rotation_trick=True)).eval()
    quantizer.codebook.data.copy_(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    z = torch.tensor([[0.0, -0.5], [0.0, 0.0]]).view(1, 2, 2, 1).requires_grad_()
    quantizer(z).codes.sum().backward()
    assert z.grad.isfinite().all()


def test_dead_codes_of_a_normalized_gradient_codebook_may_be_revived_before_the_backward_pass():
    quantizer = make(update="gradient", normalize_codes=True, revive_below=0.5).train()
    quantizer(torch.randn(4, 5, 3, 2, requires_grad=True)).loss.backward()
    assert quantizer.codebook.grad.isfinite().all()


def _half_of_the_batch(rank: int, store: str, z: torch.Tensor, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    quantizer = make().train()
    for batch in z:
        quantizer(batch.chunk(2)[rank])
    state = torch.cat([quantizer.codebook.flatten(), quantizer.code_sums.flatten(), quantizer.code_counts])
    Path(f"{out}.{rank}").write_bytes(state.numpy().tobytes())
    dist.destroy_process_group()


def test_two_processes_keep_the_averages_of_the_whole_batch(tmp_path):
    z = torch.randn(4, 6, 5, 3, 2)  # four batches of six
    arguments = (str(tmp_path / "store"), z, str(tmp_path / "state"))
    torch.multiprocessing.spawn(_half_of_the_batch, arguments, nprocs=2)
    whole = make().train()
    for batch in z:
        whole(batch)
    expected = torch.cat([whole.codebook.flatten(), whole.code_sums.flatten(), whole.code_counts])
    for rank in range(2):
        found = torch.frombuffer(bytearray((tmp_path / f"state.{rank}").read_bytes()), dtype=torch.float32)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


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
