"""The metrics against closed forms, brute force, other libraries, and figures computed elsewhere."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tessera.evaluation.figures import Figure, Protocol, Recorder
from tessera.metrics import brightness, codebook, copy_rate, frechet, kernel, precision_recall, reconstruction
from tessera.nn.neighbors import nearest


def normal(rows: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def reference(shared_data):
    """Feature sets, and the distances of pairs of them by four implementations."""
    figures = json.loads((shared_data / "fid_reference" / "reference.json").read_text())
    return dict(np.load(shared_data / "fid_reference" / "features.npz")), figures


# Fréchet distance


def test_moments_are_the_mean_and_the_unbiased_covariance():
    features = normal(23, 5, seed=0).float().numpy()
    found = frechet.moments(features)
    np.testing.assert_allclose(found.mean, features.astype(np.float64).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(features.astype(np.float64).T), rtol=1e-12)
    assert found.num_images == 23
    assert found.mean.dtype == found.covariance.dtype == torch.float64


def test_moments_of_batches_equal_those_of_the_whole_in_any_grouping():
    features = normal(101, 6, seed=1)
    whole = frechet.moments(features)
    first, second = frechet.MomentsAccumulator(), frechet.MomentsAccumulator()
    for batch in features[:60].split(7):
        first.update(batch)
    for batch in features[60:].split(1):
        second.update(batch)
    first.update(features[:0])
    second.merge(first)
    second.merge(frechet.MomentsAccumulator())
    merged = second.moments()
    assert merged.num_images == 101
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(merged.covariance, whole.covariance, rtol=1e-12, atol=1e-13)


def test_an_accumulator_does_not_change_the_one_it_merges_nor_the_moments_it_gave():
    first, second = frechet.MomentsAccumulator(), frechet.MomentsAccumulator()
    first.update(normal(9, 3, seed=2))
    before = first.moments()
    kept = before.mean.clone(), before.covariance.clone()
    second.merge(first)
    second.update(normal(9, 3, seed=3) + 5)
    torch.testing.assert_close(first.moments().mean, kept[0], rtol=0, atol=0)
    first.update(normal(9, 3, seed=4) + 5)
    torch.testing.assert_close(before.mean, kept[0], rtol=0, atol=0)
    torch.testing.assert_close(before.covariance, kept[1], rtol=0, atol=0)


def test_a_large_common_offset_costs_the_covariance_no_digits():
    features = normal(400, 4, seed=5)
    accumulator = frechet.MomentsAccumulator()
    for batch in (features + 1e7).split(50):
        accumulator.update(batch)
    torch.testing.assert_close(accumulator.moments().covariance, torch.cov(features.T), rtol=1e-6, atol=1e-7)


def test_moments_are_symmetric_and_neither_a_refused_batch_nor_an_accepted_one_is_changed_by_them():
    features = normal(40, 7, seed=16) + torch.arange(40)[:, None]
    kept = features.clone()
    accumulator = frechet.MomentsAccumulator()
    for batch in features.split(9):
        accumulator.update(batch)
    for refused in (normal(4, 2, seed=0), torch.full((2, 7), math.inf)):
        with pytest.raises(ValueError, match="features"):
            accumulator.update(refused)
    found = accumulator.moments()
    assert torch.equal(features, kept)
    assert torch.equal(found.covariance, found.covariance.T)
    np.testing.assert_allclose(found.covariance, np.cov(features.numpy().T), rtol=1e-12)


@pytest.mark.parametrize("rows", [0, 1])
def test_fewer_than_two_images_have_no_moments(rows):
    with pytest.raises(ValueError, match=f"covariance of {rows} image.*at least 2"):
        frechet.moments(normal(rows, 3, seed=0))


def test_features_that_are_not_finite_or_of_another_width_are_refused():
    accumulator = frechet.MomentsAccumulator()
    accumulator.update(normal(4, 3, seed=0))
    with pytest.raises(ValueError, match="width 2 .* width 3"):
        accumulator.update(normal(4, 2, seed=0))
    with pytest.raises(ValueError, match="not finite"):
        accumulator.update(torch.tensor([[0.0, math.nan, 0.0]]))
    with pytest.raises(ValueError, match="width 3 and 2"):
        frechet.distance(frechet.moments(normal(9, 3, seed=0)), frechet.moments(normal(9, 2, seed=0)))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["mean", "covariance"])
def test_moments_that_are_not_finite_have_no_distance_and_not_the_best_one(field, wrong):
    good = frechet.moments(normal(9, 3, seed=0))
    bad = good._replace(**{field: torch.full_like(getattr(good, field), wrong)})
    for a, b in ((good, bad), (bad, good)):
        with pytest.raises(ValueError, match="not finite"):
            frechet.distance(a, b)
        with pytest.raises(ValueError, match="not finite"):
            frechet.influence(normal(9, 3, seed=0), a, b)
    huge = good._replace(covariance=good.covariance * 1e308, mean=good.mean * 1e200)
    with pytest.raises(ValueError, match="too large"):
        frechet.distance(huge, good)


def test_a_figure_of_features_or_levels_that_are_not_finite_is_refused():
    fine, wrong = normal(60, 3, seed=0), normal(60, 3, seed=1)
    wrong[5, 1] = math.nan
    for a, b in ((fine, wrong), (wrong, fine)):
        with pytest.raises(ValueError, match="not finite"):
            kernel.distance(a, b)
        with pytest.raises(ValueError, match="not finite"):
            copy_rate.copy_rate(a, b, fine)
        with pytest.raises(ValueError, match="not finite"):
            brightness.shift(a[:, 1], b[:, 1])
    with pytest.raises(ValueError, match="not finite"):
        copy_rate.copy_rate(fine, fine, wrong)


def test_distance_of_diagonal_gaussians_is_the_closed_form():
    generator = np.random.default_rng(0)
    mean_a, mean_b = generator.normal(size=(2, 300))
    variance_a, variance_b = generator.uniform(0.1, 3, size=(2, 300))
    a, b = (
        frechet.Moments(torch.from_numpy(mean), torch.from_numpy(np.diag(variance)), 1000)
        for mean, variance in ((mean_a, variance_a), (mean_b, variance_b))
    )
    expected = ((mean_a - mean_b) ** 2).sum() + ((variance_a**0.5 - variance_b**0.5) ** 2).sum()
    assert frechet.distance(a, b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("rows", "width"), [(50, 3), (300, 280), (20, 40), (2, 5)])
def test_distance_of_a_set_from_itself_is_0_and_from_a_shifted_copy_the_square_of_the_shift(rows, width):
    features = normal(rows, width, seed=6)
    own, shifted = frechet.moments(features), frechet.moments(features + 2)
    assert 0 <= frechet.distance(own, own) < 1e-11 * width
    assert frechet.distance(own, shifted) == pytest.approx(4 * width, rel=1e-11)


@pytest.mark.parametrize("width", [1, 255, 256, 257, 600])
def test_the_blockwise_product_equals_the_plain_one_at_every_width(width):
    factor, matrix = (
        normal(width, width, seed=14).tril(),
        torch.cov(normal(width, 2 * width + 2, seed=15)).view(width, -1),
    )
    found = frechet._congruence(factor, matrix)
    torch.testing.assert_close(found.tril(), (factor.T @ matrix @ factor).tril(), rtol=1e-10, atol=1e-10)


def test_distance_is_symmetric():
    a, b = frechet.moments(normal(90, 30, seed=7)), frechet.moments(normal(25, 30, seed=8) * 2)
    assert frechet.distance(a, b) == pytest.approx(frechet.distance(b, a), rel=1e-12)


def test_constant_features_have_only_a_distance_of_means():
    zeros, ones = frechet.moments(torch.zeros(10, 4)), frechet.moments(torch.ones(3, 4))
    assert frechet.distance(zeros, ones) == 4
    spread = frechet.moments(normal(10, 4, seed=9))
    expected = float(spread.mean.square().sum() + spread.covariance.trace())
    assert frechet.distance(zeros, spread) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rows", [400, 100])
def test_distance_is_exact_for_features_that_span_fewer_dimensions_than_they_have(rows):
    x = normal(rows, 20, seed=10) @ normal(20, 64, seed=11)  # rank 20 in 64 dimensions
    y = normal(rows, 30, seed=12) @ normal(30, 64, seed=13)
    x_centered, y_centered = ((z - z.mean(dim=0)) / math.sqrt(rows - 1) for z in (x, y))
    cross = torch.linalg.svdvals(x_centered @ y_centered.T).sum()  # straight from the features, without covariances
    means = (x.mean(dim=0) - y.mean(dim=0)).square().sum()
    expected = means + x_centered.square().sum() + y_centered.square().sum() - 2 * cross
    assert frechet.distance(frechet.moments(x), frechet.moments(y)) == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("pair", ["loss|jpg_same", "loss|noisy25", "loss|jpg_test", "jpg_same|jpg_test"])
def test_distance_equals_other_implementations_on_sets_of_full_rank(reference, pair):
    features, figures = reference
    found = frechet.distance(*(frechet.moments(features[name]) for name in pair.split("|")))
    others = [value for name, value in figures[pair].items() if not name.startswith("kid")]
    assert len(others) == 4
    assert [found] * 4 == pytest.approx(others, rel=1e-9)


def test_distance_of_sets_with_fewer_images_than_features_is_exact_and_near_other_implementations(reference):
    features, figures = reference
    x, y = (features[name].astype(np.float64) for name in ("euro_tr400", "euro_te334"))
    found = frechet.distance(frechet.moments(x), frechet.moments(y))
    others = [value for name, value in figures["euro_tr400|euro_te334"].items() if not name.startswith("kid")]
    assert [found] * 4 == pytest.approx(others, rel=1e-6)  # they agree among themselves to 2e-7
    x_centered, y_centered = ((z - z.mean(axis=0)) / math.sqrt(len(z) - 1) for z in (x, y))
    cross = np.linalg.svd(x_centered @ y_centered.T, compute_uv=False).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + (x_centered**2).sum() + (y_centered**2).sum() - 2 * cross
    assert found == pytest.approx(expected, rel=1e-12)


# Its standard error


@pytest.mark.parametrize(("shift", "scale", "rows"), [(0.5, 1.2, 400), (0.0, 1.2, 400), (1.0, 0.5, 40)])
def test_the_standard_error_is_the_spread_over_independent_draws(shift, scale, rows):
    reference = frechet.moments(normal(5000, 8, seed=21))
    values, errors = [], []
    for seed in range(200):
        features = normal(rows, 8, seed=1000 + seed) * scale + shift
        own = frechet.moments(features)
        values.append(frechet.distance(own, reference))
        influences = frechet.influence(features, own, reference)
        errors.append(frechet.standard_error(influences, np.zeros(rows), rows))
    assert np.mean(errors) == pytest.approx(np.std(values, ddof=1), rel=0.15)


def test_influences_are_the_derivative_of_the_distance_by_the_weight_of_an_image():
    features, other = normal(50, 6, seed=22), frechet.moments(normal(80, 6, seed=23) * 1.5 + 1)
    own = frechet.moments(features)
    found = frechet.influence(features, own, other)

    def weighted(number: int, extra: float) -> float:
        """The distance of the set in which one image weighs more: moments divided by 49, as own's."""
        weights = torch.full((50,), 1 / 50, dtype=torch.float64) * (1 - extra)
        weights[number] += extra
        mean = weights @ features
        covariance = (weights[:, None] * (features - mean)).T @ (features - mean) * 50 / 49
        return frechet.distance(frechet.Moments(mean, covariance, 50), other)

    step = 1e-5
    derivatives = [(weighted(i, step) - weighted(i, -step)) / (2 * step) for i in range(50)]
    scatter = 50 / 49  # the influence is of the covariance as it is; here an image adds 50/49 of its own square
    assert found.sum().item() == pytest.approx(0, abs=50 * 0.05 * found.std().item())
    np.testing.assert_allclose(np.array(derivatives), found.numpy(), atol=0.06 * scatter * found.std().item())


def test_the_error_is_that_of_draws_with_fixed_shares_of_each_class():
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1], 100)
    reference = frechet.moments(normal(5000, 3, seed=24))
    values, errors, without = [], [], []
    for _ in range(200):
        features = torch.from_numpy(generator.normal(size=(200, 3)) * 0.3 + 4 * labels[:, None])
        own = frechet.moments(features)
        values.append(frechet.distance(own, reference))
        influences = frechet.influence(features, own, reference)
        errors.append(frechet.standard_error(influences, labels, 200))
        without.append(frechet.standard_error(influences, np.zeros(200), 200))
    assert np.mean(errors) == pytest.approx(np.std(values, ddof=1), rel=0.15)
    assert np.mean(without) > 3 * np.mean(errors)


def test_both_sides_of_a_pair_cancel_where_reconstructions_are_exact():
    features = normal(200, 5, seed=25)
    own = frechet.moments(features)
    both = frechet.influence(features, own, own) + frechet.influence(features, own, own)
    assert frechet.standard_error(both, np.zeros(200), 200) < 1e-6
    assert math.isnan(frechet.standard_error(both[:2], np.arange(2), 2))  # no class has two


class Halves:
    """Two draws of one mixture of two classes, as contracts.RealImages, or the second before the first."""

    def __init__(self, seed: int, is_swapped: bool = False):
        labels = np.repeat([0, 1], 100)
        of_class = 2 * torch.from_numpy(labels)[:, None]
        features = [normal(200, 6, seed=2 * seed + number) * torch.linspace(0.2, 1, 6) + of_class for number in (0, 1)]
        self.both = [
            SimpleNamespace(
                network="x",
                kind="random",
                num_images=200,
                features=some,
                labels=labels,
                moments=frechet.moments(some),
                protocol=lambda *_, **__: Protocol.model_construct(num_images=200),
            )
            for some in (reversed(features) if is_swapped else features)
        ]

    def halves(self):
        yield tuple(self.both)


def halves_figure(halves: Halves) -> Figure:
    found = Recorder().group("floor")
    frechet.of_real_images(frechet.Config(kind="frechet"), halves, found)
    return found.found.groups["floor"]["halves_fd_x"]


def test_the_error_of_the_distance_of_two_halves_is_of_both_and_is_the_spread_of_draws():
    found = [halves_figure(Halves(seed)) for seed in range(150)]
    errors, spread = [one.standard_error for one in found], np.std([one.value for one in found], ddof=1)
    assert np.mean(errors) == pytest.approx(spread, rel=0.15)
    swapped = [halves_figure(Halves(seed, is_swapped=True)).standard_error for seed in range(3)]
    assert swapped == pytest.approx(errors[:3], rel=1e-9)


# Brightness


def test_a_shift_of_one_gray_level_is_seen_beside_its_error():
    images = torch.randint(1, 250, (300, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    levels = brightness.levels(images)
    assert levels[0] == images[0].double().mean()
    assert brightness.shift(brightness.levels(images + 1), levels, paired=True) == (1, 0)
    others = torch.randint(1, 250, (300, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    alone = brightness.shift(brightness.levels(others), levels)
    assert abs(alone.value) < 3 * alone.standard_error
    assert alone.standard_error == pytest.approx(
        72 / 8 * math.sqrt(2 / 300), rel=0.1
    )  # of uniform pixels, 64 to an image


# Kernel distance


@pytest.mark.parametrize("pair", ["loss|jpg_same", "loss|noisy25", "jpg_same|jpg_test", "euro_tr400|euro_te334"])
def test_kernel_distance_of_one_class_equals_other_implementations(reference, pair):
    """Theirs of one subset, the first that this generator draws."""
    features, figures = reference
    generator = np.random.default_rng(1)
    x, y = (one[generator.permutation(len(one))[:300]] for one in (features[name] for name in pair.split("|")))
    assert kernel.distance(x, y).value == pytest.approx(figures[pair]["kid300_rng1_torch_fidelity_mmd2"], abs=1e-12)


def k(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def mean_of_pairs(x: np.ndarray, y: np.ndarray) -> float:
    """Over all pairs, or over those of two different images if both are one set."""
    return k(x, y).mean() if x is not y else k(x, x)[~np.eye(len(x), dtype=bool)].mean()


@pytest.mark.parametrize("block", [7, 192])
def test_kernel_distance_weighs_means_over_pairs_by_the_shares_of_the_classes(monkeypatch, block):
    """One class of x is not in y, and the others have other shares there: weighed as in x, that of y's own class kept."""
    monkeypatch.setattr(kernel, "BLOCK_ROWS", block)
    x_labels, y_labels = np.random.default_rng(0).permutation([0] * 20 + [1] * 30 + [2] * 10), np.arange(45) % 3 + 1
    x, y = normal(60, 5, seed=2).numpy() + x_labels[:, None], normal(45, 5, seed=3).numpy() + 0.5
    x_shares, y_shares = {0: 20 / 60, 1: 30 / 60, 2: 10 / 60}, {1: 2 / 3 * 3 / 4, 2: 2 / 3 * 1 / 4, 3: 1 / 3}
    of_x = {c: (share, x[x_labels == c]) for c, share in x_shares.items()}
    of_y = {c: (share, y[y_labels == c]) for c, share in y_shares.items()}

    def mean(one, other):
        return sum(p * q * mean_of_pairs(a, b) for p, a in one.values() for q, b in other.values())

    expected = mean(of_x, of_x) + mean(of_y, of_y) - 2 * mean(of_x, of_y)
    found = kernel.distance(torch.from_numpy(x).float().double(), y, x_labels, y_labels)
    assert found.value == pytest.approx(expected, rel=1e-6)
    assert kernel.distance(x, y, x_labels, y_labels).value == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("shift", [0.0, 0.05], ids=["one distribution", "two"])
def test_kernel_distance_of_draws_with_fixed_shares_is_unbiased_and_spreads_as_its_error_says(shift):
    """Far classes in equal shares of draws of 200 and 80: without labels the figure is far below 0."""
    centers, values, errors, without = normal(10, 32, seed=5).numpy(), [], [], []
    labels = [np.repeat(np.arange(10), number) for number in (20, 8)]
    for seed in range(150):
        random = np.random.default_rng(seed)
        x, y = (centers[some] + 0.5 * random.normal(size=(len(some), 32)) for some in labels)
        found = kernel.distance(x + shift, y, *labels)
        values.append(found.value)
        errors.append(found.standard_error)
        without.append(kernel.distance(x + shift, y).value)
    spread = np.std(values, ddof=1)
    expected = k_of_means(centers + shift, centers)
    assert abs(np.mean(values) - expected) < 3 * spread / math.sqrt(150)
    assert abs(np.mean(without) - expected) > 5 * spread
    assert 0.9 * spread < np.mean(errors) < 1.3 * spread


def k_of_means(centers: np.ndarray, others: np.ndarray, variance: float = 0.25) -> float:
    """The distance of two mixtures of Gaussians around centers in equal shares: E (1 + s)^3 for s of mean m and variance v is
    (1 + m)^3 + 3 (1 + m) v + a third moment, all in closed form for x.y / D of independent Gaussians."""
    width = centers.shape[1]

    def mean(a, b):
        m = 1 + a @ b.T / width
        squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None]
        v = (variance * squares + variance**2 * width) / width**2
        third = 6 * variance**2 * (a @ b.T) / width**3
        return (m**3 + 3 * m * v + third).mean()

    return mean(centers, centers) + mean(others, others) - 2 * mean(centers, others)


def test_the_error_of_a_kernel_distance_is_taken_from_some_of_many_images(monkeypatch):
    labels = np.arange(300) % 3
    x, y = normal(300, 8, seed=0) + torch.from_numpy(labels)[:, None], normal(300, 8, seed=1) + 0.3
    whole = kernel.distance(x, y, labels, labels)
    monkeypatch.setattr(kernel, "ERROR_IMAGES", 60)
    some = kernel.distance(x, y, labels, labels)
    assert some.value == whole.value
    assert some.standard_error == pytest.approx(whole.standard_error, rel=0.2)
    assert some.standard_error != whole.standard_error


def test_single_images_of_classes_have_the_noise_of_the_others_and_single_ones_alone_are_refused():
    """Half of the images of x are alone in their classes; all classes are alike."""
    labels, values = np.r_[np.repeat(np.arange(3), 5), 3:18], []
    for seed in range(150):
        values.append(
            kernel.distance(normal(30, 4, seed=seed), normal(60, 4, seed=999 - seed), labels, labels[:1].repeat(60))
        )
    assert abs(np.mean([found.value for found in values])) < 3 * np.std([found.value for found in values]) / math.sqrt(
        150
    )
    with pytest.raises(ValueError, match="no class has two of the 9 images.*Raise sample_images.num_images"):
        kernel.distance(normal(9, 4, seed=0), normal(60, 4, seed=1), np.arange(9))
    with pytest.raises(ValueError, match="same feature network"):
        kernel.distance(normal(20, 3, seed=0), normal(10, 2, seed=1))


# Precision and recall, density and coverage


def brute_force(reference: np.ndarray, samples: np.ndarray, k: int) -> tuple[float, float, float, float]:
    """The four definitions, one pair of images at a time."""

    def radius(points, i):
        return sorted(math.dist(points[i], points[j]) for j in range(len(points)) if j != i)[k - 1]

    real_radii = [radius(reference, i) for i in range(len(reference))]
    fake_radii = [radius(samples, j) for j in range(len(samples))]
    gap = [[math.dist(r, s) for s in samples] for r in reference]
    n, m = range(len(reference)), range(len(samples))
    in_real = [[0 < real_radii[i] >= gap[i][j] for j in m] for i in n]  # a ball of radius 0 holds nothing
    in_fake = [[0 < fake_radii[j] >= gap[i][j] for j in m] for i in n]
    precision = np.mean([any(in_real[i][j] for i in n) for j in m])
    recall = np.mean([any(in_fake[i]) for i in n])
    density = sum(map(sum, in_real)) / (k * len(samples))
    coverage = np.mean([any(in_real[i]) for i in n])
    return precision, recall, density, coverage


@pytest.mark.parametrize("chunk", [1, 7, 1024])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_neighbour_metrics_equal_brute_force_for_any_chunk(monkeypatch, chunk, k):
    monkeypatch.setattr(precision_recall, "CHUNK_ROWS", chunk)
    reference, samples = normal(31, 4, seed=0).numpy(), 0.7 * normal(26, 4, seed=1).numpy() + 0.5
    found = (
        *precision_recall.precision_recall(reference, samples, k),
        *precision_recall.density_coverage(reference, samples, k)[:2],
    )
    assert found == pytest.approx(brute_force(reference, samples, k), abs=1e-12)
    assert min(found) > 0


def neighbor_sets(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Sets that are hard on distances from products."""
    random = np.random.default_rng(7)
    if name == "copies":  # samples are reference images, some of them many times, as are some of the reference
        reference = random.normal(size=(40, 30)).astype(np.float32) + np.float32(3)
        reference[30:] = reference[:10]
        return reference, reference[random.integers(0, 40, 50)]
    if name == "integers":  # most balls have several images on their rim
        return random.integers(0, 3, (50, 6)), random.integers(0, 3, (40, 6)) + 1
    if name == "offset integers":
        return tuple((one + 4096).astype(np.float32) for one in neighbor_sets("integers"))
    if name == "crowds":  # so near to each other that float32 sees single points
        centers = 100 * random.normal(size=(2, 3))
        reference, samples = (centers[random.integers(0, 2, count)] for count in (90, 70))
        return reference + 1e-4 * random.normal(size=(90, 3)), samples + 1e-4 * random.normal(size=(70, 3))
    if name == "far":  # beside one sample all else is below the range of float32
        reference, samples = random.normal(size=(40, 5)), random.normal(size=(30, 5))
        return reference, np.concatenate([samples, 1e23 * samples[:1]])
    if name == "one point":
        return np.full((9, 3), 0.1), np.full((7, 3), 0.1)
    scale = {"tiny": 1e-30, "huge": 1e30}[name]
    reference, samples = scale * random.normal(size=(40, 5)), scale * random.normal(size=(30, 5))
    return np.concatenate([reference, 1e4 * reference[:3]]), samples


@pytest.mark.parametrize("products", ["highest", "medium"])
@pytest.mark.parametrize(
    "name", ["copies", "integers", "offset integers", "crowds", "far", "one point", "tiny", "huge"]
)
def test_neighborhoods_equal_brute_force_where_rounding_could_decide(monkeypatch, name, products):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: products)
    reference, samples = neighbor_sets(name)
    kept = reference.copy(), samples.copy()
    (precision, recall, *_), (*_, density, coverage) = (brute_force(reference, samples, k) for k in (3, 5))
    for chunk in (11, 512):
        monkeypatch.setattr(precision_recall, "CHUNK_ROWS", chunk)
        found = precision_recall.neighborhoods(reference, samples)
        assert found[:4] == pytest.approx((precision, recall, density, coverage), abs=1e-12)
    np.testing.assert_array_equal(reference, kept[0])
    np.testing.assert_array_equal(samples, kept[1])


def test_neighborhoods_of_many_features_equal_subtraction_in_float64():
    reference, samples = (torch.randn(300, 500, generator=torch.Generator().manual_seed(s)).relu_() for s in (1, 2))
    samples[:40] = reference[:40] + 0.01 * samples[:40]
    within, between = (
        torch.cdist(reference.double(), reference.double()),
        torch.cdist(samples.double(), reference.double()),
    )
    radii = within.sort(dim=1).values  # the first is an image itself
    own = torch.cdist(samples.double(), samples.double()).sort(dim=1).values[:, 3]
    found = precision_recall.neighborhoods(reference, samples)
    inside = between <= radii[:, 5]
    assert found.precision == pytest.approx((between <= radii[:, 3]).any(dim=1).double().mean().item())
    assert found.recall == pytest.approx((between <= own[:, None]).any(dim=0).double().mean().item())
    assert found.density == pytest.approx(inside.sum().item() / 5 / 300)
    assert found.coverage == pytest.approx(inside.any(dim=0).double().mean().item())
    hits = inside.double().sum(dim=1) / 5
    assert found.density_standard_error == pytest.approx(hits.std().item() / math.sqrt(300))
    assert precision_recall.precision_recall(reference, samples) == found[:2]
    assert precision_recall.density_coverage(reference, samples) == found[2:5]


def test_equal_sets_are_wholly_precise_recalled_and_covered():
    features = normal(60, 5, seed=2) + 100
    assert precision_recall.precision_recall(features, features) == (1, 1)
    assert precision_recall.density_coverage(features, features).coverage == 1


def test_images_that_occur_more_than_k_times_are_no_neighbourhood_of_themselves():
    """A ball of radius 0 says nothing of what is near. Other balls may hold such images."""
    constant, few = torch.ones(20, 3), normal(5, 3, seed=7).repeat(8, 1)
    for images in (constant, few):
        found = precision_recall.neighborhoods(images, images)
        assert found[:4] == (0, 0, 0, 0) and found.recall_standard_error > 0
    assert precision_recall.precision_recall(normal(200, 3, seed=3), 0 * constant).precision == 1


@pytest.mark.parametrize(("num_real", "num_samples", "width", "shift"), [(300, 300, 24, 0.0), (300, 600, 6, 0.4)])
def test_the_errors_of_recall_and_coverage_are_their_spread_over_draws_of_the_samples(
    num_real, num_samples, width, shift
):
    """The reference stays. Neighbouring balls are hit by the same samples, which a binomial error knows nothing of."""
    reference = normal(num_real, width, seed=1)
    found = [
        precision_recall.neighborhoods(reference, normal(num_samples, width, seed=100 + seed) + shift)
        for seed in range(80)
    ]
    for name in ("recall", "coverage"):
        spread = np.std([getattr(one, name) for one in found], ddof=1)
        error = np.mean([getattr(one, f"{name}_standard_error") for one in found])
        assert 0.85 * spread < error < 1.4 * spread, (name, error, spread)


def test_the_error_of_a_share_of_disjoint_targets_is_that_of_occupied_cells():
    """In closed form: N cells of which M balls fall into each alike; Feller, volume 1, section IX.5."""
    cells, balls = 500, 700
    misses = (1 - 1 / cells) ** balls
    expected = (misses + (cells - 1) * (1 - 2 / cells) ** balls - cells * misses**2) / cells
    fallen = torch.randint(cells, (balls,), generator=torch.Generator().manual_seed(0))
    found = precision_recall._error_of_share(torch.nn.functional.one_hot(fallen, cells).T.bool())
    assert found == pytest.approx(math.sqrt(expected), rel=0.1)


def test_a_collapsed_generator_is_precise_without_recall_and_a_distant_one_has_neither():
    reference = normal(200, 3, seed=3)
    collapsed = 0.01 * normal(100, 3, seed=4) + reference[0]
    precision, recall = precision_recall.precision_recall(reference, collapsed)
    assert precision > 0.9
    assert recall < 0.05
    assert precision_recall.density_coverage(reference, collapsed).coverage < 0.2
    assert precision_recall.precision_recall(reference, collapsed + 50) == (0, 0)
    assert precision_recall.density_coverage(reference, collapsed + 50) == (0, 0, 0)


def test_one_outlier_of_the_reference_lifts_precision_but_hardly_density():
    reference = torch.cat([normal(100, 2, seed=5), torch.tensor([[60.0, 60.0]], dtype=torch.float64)])
    samples = normal(100, 2, seed=6) + 30  # in the huge ball of the outlier only
    assert precision_recall.precision_recall(reference, samples).precision == 1
    assert precision_recall.density_coverage(reference, samples).density == pytest.approx(1 / 5)


def test_a_neighbour_that_does_not_exist_is_refused():
    few, many = normal(4, 2, seed=0), normal(9, 2, seed=1)
    with pytest.raises(ValueError, match="among 4 images there is no neighbour number 4"):
        precision_recall.precision_recall(many, few, k=4)
    with pytest.raises(ValueError, match="choose k from 1 to 3"):
        precision_recall.density_coverage(few, many, k=5)
    with pytest.raises(ValueError, match="same feature network"):
        precision_recall.density_coverage(many, normal(9, 3, seed=0))
    with pytest.raises(ValueError, match="not finite"):
        precision_recall.neighborhoods(many, torch.where(many > 1, math.nan, many), 1, 1)
    assert precision_recall.density_coverage(many, few[:1], k=4).density >= 0  # one sample is enough for these two


# Reconstruction


def pictures(*shape: int, seed: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_psnr_is_the_mean_of_the_images_not_that_of_the_pooled_error():
    originals = torch.full((2, 1, 3, 5), 0.5)
    images = originals.clone()
    images[0] += 0.1  # 20 dB
    images[1] += 0.01  # 40 dB
    assert reconstruction.psnr_db(images, originals).mean().item() == pytest.approx(30, abs=1e-4)
    assert reconstruction.psnr_db(originals, originals).mean().item() == 100
    assert reconstruction.psnr_db(images, originals, ceiling=35).mean().item() == pytest.approx(27.5, abs=1e-4)


def test_psnr_and_ssim_equal_figures_computed_elsewhere(shared_data):
    original, *images = (
        torch.from_numpy(np.array(Image.open(shared_data / "psnr_ssim" / f"ex_{name}.png").convert("RGB")))
        .permute(2, 0, 1)[None]
        .float()
        / 255
        for name in ("ref", "p0", "p1")
    )
    assert [reconstruction.psnr_db(image, original).mean().item() for image in images] == pytest.approx(
        [18.0455, 13.8675], abs=5e-5
    )
    assert [reconstruction.ssim(image, original).mean().item() for image in images] == pytest.approx(
        [0.45009, 0.28592], abs=1e-5
    )


@pytest.mark.parametrize("shape", [(1, 1, 11, 11), (3, 3, 20, 13), (2, 1, 28, 28)])
def test_psnr_and_ssim_equal_torchmetrics(shape):
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    originals = pictures(*shape, seed=0)
    images = (originals + 0.2 * pictures(*shape, seed=1)).clamp(0, 1)
    expected = structural_similarity_index_measure(images.double(), originals.double(), data_range=1.0).item()
    assert reconstruction.ssim(images, originals).mean().item() == pytest.approx(expected, abs=1e-9)
    ratio = peak_signal_noise_ratio(
        images.double(), originals.double(), data_range=1.0, reduction="elementwise_mean", dim=(1, 2, 3)
    )
    assert reconstruction.psnr_db(images, originals).mean().item() == pytest.approx(
        ratio.item(), abs=1e-5
    )  # its logarithm is float32


def test_ssim_is_the_formula_in_a_window_around_each_pixel():
    x, y = pictures(1, 1, 8, 9, seed=2).double(), pictures(1, 1, 8, 9, seed=3).double()
    bell = np.exp(-((np.arange(7) - 3) ** 2) / (2 * 1.5**2))  # 7: the largest odd window in 8 pixels
    window = np.outer(bell, bell) / bell.sum() ** 2
    padded_x, padded_y = (np.pad(z[0, 0].numpy(), 3, mode="reflect") for z in (x, y))
    c1, c2 = 0.01**2, 0.03**2
    values = []
    for row in range(8):
        for col in range(9):
            a, b = (z[row : row + 7, col : col + 7] for z in (padded_x, padded_y))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            variances = (window * (a - mean_a) ** 2).sum() + (window * (b - mean_b) ** 2).sum()
            covariance = (window * (a - mean_a) * (b - mean_b)).sum()
            value = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
            values.append(value / ((mean_a**2 + mean_b**2 + c1) * (variances + c2)))
    assert reconstruction.ssim(x, y).mean().item() == pytest.approx(np.mean(values), rel=1e-10)


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (2, 3, 5, 30), (1, 1, 1, 1), (2, 1, 2, 9), (1, 2, 10, 12)])
def test_the_window_shrinks_for_images_smaller_than_it(shape):
    originals, images = pictures(*shape, seed=4), pictures(*shape, seed=5)
    assert reconstruction.ssim(originals, originals).mean().item() == pytest.approx(1)
    assert -1 <= reconstruction.ssim(images, originals).mean().item() < 1


def test_figures_do_not_depend_on_how_many_images_are_held_at_a_time(monkeypatch):
    originals, images = pictures(7, 1, 9, 12, seed=6), pictures(7, 1, 9, 12, seed=7)
    whole = [measure(images, originals) for measure in (reconstruction.psnr_db, reconstruction.ssim)]
    monkeypatch.setattr(reconstruction, "CHUNK_NUMBERS", 3 * 9 * 12 + 1)
    chunked = [measure(images, originals) for measure in (reconstruction.psnr_db, reconstruction.ssim)]
    assert all(torch.equal(one, other) for one, other in zip(whole, chunked, strict=True))


@pytest.mark.parametrize("measure", [reconstruction.psnr_db, reconstruction.ssim])
def test_images_in_another_range_dtype_or_shape_are_refused(measure):
    fine = pictures(2, 1, 12, 12, seed=8)
    for wrong in (fine * 2 - 1, fine * 255, (fine * 255).to(torch.uint8), fine * math.nan):
        with pytest.raises(ValueError, match=r"expected float in \[0, 1\]"):
            measure(wrong, fine)
    with pytest.raises(ValueError, match="each original beside its reconstruction"):
        measure(fine[:1], fine)


# Codebook


def test_use_of_a_codebook_is_the_closed_form():
    found = codebook.use(codebook.count(np.array([[0, 0, 1], [1, 3, 3]], dtype=np.uint16), 8))
    assert found.codebook_usage == 3 / 8
    assert found.codebook_perplexity == pytest.approx(3, rel=1e-12)
    assert found.dead_codes == 5
    assert found.codebook_bits == pytest.approx(math.log2(3), rel=1e-12)
    uneven = codebook.use(torch.tensor([2, 1, 1]))  # entropy 1.5 bits
    assert uneven.codebook_bits == pytest.approx(1.5, rel=1e-12)
    assert uneven.codebook_perplexity == pytest.approx(2**1.5, rel=1e-12)


def test_use_is_extreme_for_one_code_and_for_all_codes_alike():
    assert codebook.use(codebook.count(torch.full((2, 3, 4), 5), 16)) == (1 / 16, 1, 15, 0)
    even = codebook.use(codebook.count(torch.arange(1024).repeat(3).view(3, 32, 32), 1024))
    assert even.codebook_usage == 1
    assert even.dead_codes == 0
    assert even.codebook_perplexity == pytest.approx(1024, rel=1e-12)
    assert even.codebook_bits == pytest.approx(10, rel=1e-12)


def test_counts_of_batches_add_up():
    indices = torch.randint(9, (50, 2, 3), generator=torch.Generator().manual_seed(0))
    total = sum(codebook.count(batch, 12) for batch in indices.split(16))
    assert total.tolist() == np.bincount(indices.flatten().numpy(), minlength=12).tolist()


def test_indices_outside_the_codebook_latents_and_nothing_are_refused():
    for outside in ([0, 8], [-1, 3]):
        with pytest.raises(ValueError, match="outside 0 to 7"):
            codebook.count(np.array(outside), 8)
    with pytest.raises(ValueError, match="not the latents"):
        codebook.count(torch.rand(3), 8)
    with pytest.raises(ValueError, match="no indices were counted"):
        codebook.use(codebook.count(np.zeros(0, np.int64), 8))


def test_copies_are_counted_and_new_samples_are_not():
    """In two dimensions, where distances are known: copies with a trace of noise, draws of the same law, far points."""
    random = np.random.default_rng(0)
    train, held_out, new = (random.normal(size=(count, 2)) for count in (2000, 1000, 1000))
    copies = train[:1000] + random.normal(scale=1e-4, size=(1000, 2))
    assert copy_rate.copy_rate(copies, train, held_out) > 0.95
    assert copy_rate.copy_rate(new, train, held_out) == pytest.approx(copy_rate.HELD_OUT_SHARE, abs=0.025)
    assert copy_rate.copy_rate(new + 50, train, held_out) == 0
    half = np.concatenate([copies[:500], new[:500] + 50])
    assert copy_rate.copy_rate(half, train, held_out) == pytest.approx(0.5, abs=0.03)


def test_the_error_of_the_copy_rate_is_its_spread_over_draws_of_samples_and_held_out_images():
    train, found = normal(800, 6, seed=60), []
    for seed in range(100):
        samples, held_out = 0.9 * normal(500, 6, seed=500 + seed), normal(200, 6, seed=900 + seed)
        found.append(copy_rate.share_of_copies(nearest(samples, train).distances, nearest(held_out, train).distances))
    spread = np.std([one.rate for one in found], ddof=1)
    assert np.mean([one.standard_error for one in found]) == pytest.approx(spread, rel=0.2)
    assert 0.7 * spread > (0.07 * 0.93 / 500) ** 0.5  # that of the samples alone


@pytest.mark.parametrize(
    ("part", "scale", "is_memory"), [(0.2, 1.0, True), (1.0, 1.0, True), (0.0, 0.5, False), (0.0, 0.7, False)]
)
def test_copies_are_learned_by_heart_and_samples_of_a_truncated_sampler_are_not(part, scale, is_memory):
    """Both have a high rate: near training images, and where images are dense."""
    real, samples = normal(1200, 8, seed=70).numpy(), scale * normal(1000, 8, seed=71).numpy()
    train, held_out, number = real[:900], real[900:], int(part * 1000)
    samples[:number] = train[np.arange(number) % 900] + 0.02 * samples[:number]
    found = copy_rate.share_of_copies(nearest(samples, train).distances, nearest(held_out, train).distances)
    assert found.rate > copy_rate.SUSPICIOUS_SHARE
    assert copy_rate.are_learned_by_heart(samples, train, held_out, found.threshold) == is_memory
    told, number = Recorder().group("generation"), Protocol.model_construct(num_images=len(samples))
    seen = SimpleNamespace(
        features=samples,
        real_features=lambda split, is_limited=False: train if split == "train" else held_out,
        protocol=lambda *_, **__: number,
    )
    drawn = SimpleNamespace(are_real=False, first=seen, nearest_training=nearest(samples, train))
    copy_rate.of_samples(copy_rate.Config(kind="copy_rate"), drawn, told)
    assert told.found.groups["generation"]["copy_rate"].standard_error == found.standard_error
    assert [("learned images by heart" in one) for one in told.alarms] == [True] * is_memory
    assert [("they are no copies" in one) for one in told.notes] == [True] * (not is_memory)


def test_the_copy_rate_is_that_of_brute_force():
    random = np.random.default_rng(1)
    samples, train, held_out = (random.normal(size=(count, 3)) for count in (30, 70, 41))

    def nearest(point):
        return min(float(np.linalg.norm(point - other)) for other in train)

    threshold = np.quantile([nearest(point) for point in held_out], copy_rate.HELD_OUT_SHARE)
    expected = np.mean([nearest(point) < threshold for point in samples])
    assert copy_rate.copy_rate(samples, train, held_out) == pytest.approx(expected)
