"""digits, mnist, cifar10 and the downloader: against the sources, read in another way."""

import gzip
import hashlib
import importlib.util
import io
import lzma
import os
import pickle
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from tessera.components import InvalidParams, load, parse
from tessera.datasets import cifar10, digits, mnist
from tessera.sources.records import stratified_test_rows

ROOT = Path(__file__).parents[2]


def images_of(records, split):
    return np.stack([record.image for record in records if record.split == split])


def labels_of(records, split):
    return [record.label for record in records if record.split == split]


def write_idx(path, array, opener=open):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    with opener(path, "wb") as file:
        file.write(header + array.tobytes())


def write_mnist(folder, num_train=30, num_test=10, prefix="", suffix="", opener=open):
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for split, number in (("train", num_train), ("t10k", num_test)):
        arrays[split] = generator.integers(0, 256, (number, 28, 28), np.uint8), np.arange(number, dtype=np.uint8) % 10
        write_idx(folder / f"{prefix}{split}-images-idx3-ubyte{suffix}", arrays[split][0], opener)
        write_idx(folder / f"{prefix}{split}-labels-idx1-ubyte{suffix}", arrays[split][1], opener)
    return arrays


def mnist_records(folder, **knobs):
    return list(mnist.records(mnist.Config(kind="mnist", source=str(folder), **knobs)))


@pytest.mark.parametrize("kind", ["digits", "mnist", "cifar10"])
def test_the_size_is_known_before_any_data_are_read_and_is_that_of_the_spec(kind):
    config = load("datasets", kind).Config(kind=kind, source="nowhere")
    spec = load("datasets", kind).spec(config)
    assert (spec.channels, spec.height, spec.width) == (config.channels, config.height, config.width)
    assert spec.num_classes == config.num_classes == len(spec.class_names) == 10
    assert spec.name == config.name and spec.licence == load("datasets", kind).LICENCE


def test_digits_are_those_of_scikit_learn_scaled_to_255():
    records = list(digits.records(digits.Config(kind="digits", source="requirements.lock")))
    bunch = load_digits()
    assert len(records) == len({record.source for record in records}) == 1797
    for record in records:
        row = int(record.source.rpartition("/")[2])
        assert abs(record.image[0] / 255 * 16 - bunch.images[row]).max() <= 0.5 / 255 * 16
        assert record.label == bunch.target[row]
        assert record.sha256 == hashlib.sha256(record.image.tobytes()).hexdigest()
    assert max(record.image.max() for record in records) == 255


def test_upsampling_repeats_each_pixel():
    plain, large = (
        next(digits.records(digits.Config(kind="digits", source="x", upsample=factor))).image for factor in (1, 3)
    )
    assert large.shape == (1, 24, 24)
    for row in range(3):
        for column in range(3):
            np.testing.assert_array_equal(large[:, row::3, column::3], plain)


def test_the_digits_split_is_stratified_and_depends_on_its_seed_alone():
    config = digits.Config(kind="digits", source="x", test_fraction=0.25)
    first, again = list(digits.records(config)), list(digits.records(config))
    other = list(digits.records(config.model_copy(update={"split_seed": 1})))
    assert [record[:4] for record in first] == [record[:4] for record in again]
    assert {r.source for r in first if r.split == "test"} != {r.source for r in other if r.split == "test"}
    totals = np.bincount(load_digits().target)
    tests = np.bincount(labels_of(first, "test"))
    assert (abs(tests - totals * 0.25) <= 0.5).all()


def test_a_stratified_split_leaves_an_image_on_either_side_of_each_class():
    labels = np.array([0, 0, 1, 1, 1, 2])
    for fraction in (0.01, 0.99):
        is_test = stratified_test_rows(labels, fraction, seed=0)
        assert 1 <= is_test[:2].sum() <= 1 and 1 <= is_test[2:5].sum() <= 2
        assert not is_test[5]  # a single image trains


@pytest.mark.parametrize(("suffix", "opener"), [("", open), (".gz", gzip.open), (".xz", lzma.open)])
@pytest.mark.parametrize("prefix", ["", "mnist-"])
def test_mnist_is_read_plain_or_packed_with_or_without_a_prefix(tmp_path, suffix, opener, prefix):
    arrays = write_mnist(tmp_path, prefix=prefix, suffix=suffix, opener=opener)
    records = mnist_records(tmp_path)
    for split, key in (("train", "train"), ("test", "t10k")):
        np.testing.assert_array_equal(images_of(records, split)[:, 0], arrays[key][0])
        assert labels_of(records, split) == arrays[key][1].tolist()


def test_real_mnist_equals_a_four_line_reader(shared_data):
    folder = shared_data / "mnist"
    records = mnist_records(folder, pad=2, num_train=2000)
    raw = lzma.decompress((folder / "mnist-train-images-idx3-ubyte.xz").read_bytes())
    expected = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 28, 28)[:2000]
    images = images_of(records, "train")
    assert images.shape == (2000, 1, 32, 32)
    np.testing.assert_array_equal(images[:, 0, 2:-2, 2:-2], expected)
    assert images.sum(dtype=np.int64) == expected.sum(dtype=np.int64)  # the border is black
    raw = lzma.decompress((folder / "mnist-t10k-labels-idx1-ubyte.xz").read_bytes())
    assert labels_of(records, "test") == list(raw[8:])


def test_mnist_can_be_cut_to_its_first_images(tmp_path):
    arrays = write_mnist(tmp_path)
    records = mnist_records(tmp_path, num_train=7, num_test=3)
    np.testing.assert_array_equal(images_of(records, "train")[:, 0], arrays["train"][0][:7])
    np.testing.assert_array_equal(images_of(records, "test")[:, 0], arrays["t10k"][0][:3])


def damage_magic(data):
    return b"\x00\x00\x09" + data[3:]


def damage_tail(data):
    return data[:-1]


def add_tail(data):
    return data + b"x"


def empty(data):
    return b""


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [(damage_magic, "expected 00 00 08 03"), (damage_tail, "damaged"), (add_tail, "damaged"), (empty, "nothing")],
)
def test_a_damaged_idx_file_is_named(tmp_path, damage, sentence):
    write_mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=sentence) as caught:
        mnist_records(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("suffix", "opener"), [(".gz", gzip.open), (".xz", lzma.open)])
def test_a_cut_packed_idx_file_is_named(tmp_path, suffix, opener):
    write_mnist(tmp_path, suffix=suffix, opener=opener)
    path = tmp_path / f"t10k-images-idx3-ubyte{suffix}"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="damaged") as caught:
        mnist_records(tmp_path)
    assert str(path) in str(caught.value)


def test_a_packed_idx_file_unpacks_no_further_than_its_header_says(tmp_path):
    write_mnist(tmp_path, suffix=".gz", opener=gzip.open)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    with gzip.open(path, "ab") as file:
        for _ in range(64):
            file.write(bytes(2**20))
    with pytest.raises(ValueError, match="more than 23,520 bytes"):
        mnist_records(tmp_path)


def test_mnist_files_that_do_not_fit_together_are_refused(tmp_path):
    write_mnist(tmp_path / "a")
    write_idx(tmp_path / "a" / "train-labels-idx1-ubyte", np.zeros(29, np.uint8))
    with pytest.raises(ValueError, match="30 images but .* 29 labels"):
        mnist_records(tmp_path / "a")
    write_mnist(tmp_path / "b")
    write_idx(tmp_path / "b" / "t10k-labels-idx1-ubyte", np.full(10, 10, np.uint8))
    with pytest.raises(ValueError, match="label 10, expected 0 to 9"):
        mnist_records(tmp_path / "b")
    write_mnist(tmp_path / "c")
    write_idx(tmp_path / "c" / "train-images-idx3-ubyte", np.zeros((30, 32, 28), np.uint8))
    with pytest.raises(ValueError, match=r"\(32, 28\) pixels, expected \(28, 28\)"):
        mnist_records(tmp_path / "c")


def test_two_data_sets_in_one_mnist_folder_are_refused_and_none_is_named(tmp_path):
    write_mnist(tmp_path / "both", prefix="mnist-")
    write_mnist(tmp_path / "both", prefix="fashion-")
    with pytest.raises(ValueError, match=r"prefixes \['fashion-', 'mnist-'\]"):
        mnist_records(tmp_path / "both")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"has no train-images.*download.py mnist"):
        mnist_records(tmp_path / "none")
    with pytest.raises(ValueError, match="not there or not a folder"):
        mnist_records(tmp_path / "nowhere")


class PythonTwoPickler(pickle._Pickler):
    """Writes bytes and text as Python 2 wrote its str, which is what the published batches hold."""

    def save_old_string(self, value):
        data = value.encode("latin-1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch = {**pickle._Pickler.dispatch, bytes: save_old_string, str: save_old_string}


def batch_bytes(pixels, labels):
    out = io.BytesIO()
    PythonTwoPickler(out, protocol=2).dump({"batch_label": "x", "labels": labels, "data": pixels, "filenames": ["a"]})
    return out.getvalue().replace(b"numpy._core", b"numpy.core")


def cifar_batches(num_images=4):
    generator = np.random.default_rng(1)
    return {
        name: (generator.integers(0, 256, (num_images, 3072), np.uint8), generator.integers(0, 10, num_images).tolist())
        for name in cifar10.BATCHES
    }


def write_cifar_tar(path, batches):
    with tarfile.open(path, "w:gz") as archive:
        for name, batch in reversed(batches.items()):  # the published order differs from ours, too
            data = batch_bytes(*batch)
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def cifar_records(source, **knobs):
    return list(cifar10.records(cifar10.Config(kind="cifar10", source=str(source), **knobs)))


def test_a_python_two_pickle_of_the_tests_is_what_pickle_itself_reads():
    batch = cifar_batches()["test_batch"]
    read = pickle.loads(batch_bytes(*batch), encoding="bytes")  # noqa: S301 (written a line above)
    np.testing.assert_array_equal(read[b"data"], batch[0])


@pytest.mark.parametrize("packed", [True, False])
def test_cifar10_batches_are_read_in_order_from_a_folder_or_the_tar(tmp_path, packed):
    batches = cifar_batches()
    source = tmp_path / "cifar-10-python.tar.gz"
    write_cifar_tar(source, batches)
    if not packed:
        source = tmp_path / "cifar-10-batches-py"
        source.mkdir()
        for name, batch in batches.items():
            (source / name).write_bytes(batch_bytes(*batch))
    records = cifar_records(source)
    train = [batches[f"data_batch_{number}"] for number in range(1, 6)]
    expected = np.concatenate([pixels for pixels, _ in train])
    np.testing.assert_array_equal(images_of(records, "train").reshape(-1, 3072), expected)
    assert labels_of(records, "train") == [label for _, labels in train for label in labels]
    np.testing.assert_array_equal(images_of(records, "test").reshape(-1, 3072), batches["test_batch"][0])


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_names_a_function_is_refused_and_runs_nothing(tmp_path):
    for name, batch in cifar_batches().items():
        (tmp_path / name).write_bytes(batch_bytes(*batch))
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps({b"data": Evil(tmp_path / "ran")}))
    with pytest.raises(ValueError, match=r"data_batch_3.*names posix\.system"):
        cifar_records(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        pickle.dumps([]),
        batch_bytes(np.zeros((3, 3072), np.uint8), [0, 1]),  # too few labels
        batch_bytes(np.zeros((2, 3072), np.uint8), [0, 10]),  # no such class
        batch_bytes(np.zeros((2, 3072), np.float32), [0, 1]),
        batch_bytes(np.zeros((2, 3072), np.int8), [0, 1]),
        batch_bytes(np.asfortranarray(np.ones((2, 3072), np.uint8)), [0, 1]),
        batch_bytes(np.array([None, None]), [0, 1]),
    ],
)
def test_what_is_no_batch_is_named(tmp_path, content):
    for name, batch in cifar_batches().items():
        (tmp_path / name).write_bytes(batch_bytes(*batch))
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match="test_batch"):
        cifar_records(tmp_path)


def test_cifar10_with_a_batch_missing_twice_or_cut_is_refused(tmp_path):
    batches = cifar_batches()
    write_cifar_tar(tmp_path / "cut.tar.gz", batches)
    data = (tmp_path / "cut.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="cannot be unpacked"):
        cifar_records(tmp_path / "cut.tar.gz")
    del batches["data_batch_2"]
    write_cifar_tar(tmp_path / "missing.tar.gz", batches)
    with pytest.raises(ValueError, match="has no data_batch_2"):
        cifar_records(tmp_path / "missing.tar.gz")
    with pytest.raises(ValueError, match="does not exist"):
        cifar_records(tmp_path / "nowhere.tar.gz")


def test_cifar10_npz_keeps_every_image_and_label(shared_data):
    path = shared_data / "cifar10_lossless4000.npz"
    records = cifar_records(path, test_fraction=0.1)
    with np.load(path) as arrays:
        x, y = arrays["x"], arrays["y"]
    assert len(records) == 4000
    for record in records:
        row = int(record.source.rpartition("/")[2])
        assert record.label == y[row]
        np.testing.assert_array_equal(record.image.transpose(1, 2, 0), x[row])
    assert (abs(np.bincount(labels_of(records, "test")) - 0.1 * np.bincount(y)) <= 0.5).all()


@pytest.mark.parametrize(
    "arrays",
    [
        {"x": np.zeros((5, 32, 32, 3), np.float32), "y": np.zeros(5, np.uint8)},
        {"x": np.zeros((5, 3, 32, 32), np.uint8), "y": np.zeros(5, np.uint8)},
        {"x": np.zeros((5, 32, 32, 3), np.uint8), "y": np.zeros(4, np.uint8)},
        {"x": np.zeros((5, 32, 32, 3), np.uint8), "y": np.full(5, 10)},
        {"x": np.zeros((5, 32, 32, 3), np.uint8)},
        {"x": np.array([Evil("x")], object), "y": np.zeros(1, np.uint8)},
    ],
)
def test_an_npz_of_anything_else_is_refused(tmp_path, arrays):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=r"x\.npz"):
        cifar_records(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [("digits", {"upsample": 0}), ("digits", {"test_fraction": 1.0}), ("mnist", {"pad": -1}), ("mnist", {"source": 1})],
)
def test_impossible_settings_are_refused(kind, wrong):
    with pytest.raises(InvalidParams, match=next(iter(wrong))):
        parse(load("datasets", kind).Config, {"kind": kind, "source": "x", **wrong})


def downloader():
    spec = importlib.util.spec_from_file_location("download", ROOT / "data" / "download.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_download_is_checked_and_whole_or_absent(tmp_path, monkeypatch):
    download = downloader()
    original = tmp_path / "host" / "set.bin"
    original.parent.mkdir()
    original.write_bytes(b"data set")
    right = download.File(original.as_uri(), hashlib.md5(b"data set").hexdigest())
    folder = tmp_path / "deep" / "folder"
    assert download.fetch(right, folder).read_bytes() == b"data set"

    (folder / "set.bin").write_bytes(b"damaged")
    download.fetch(right, folder)
    assert (folder / "set.bin").read_bytes() == b"data set"

    original.unlink()
    download.fetch(right, folder)  # there already: the host is not asked

    original.write_bytes(b"other data")
    other = tmp_path / "other"
    with pytest.raises(ValueError, match=f"expected {right.md5}"):
        download.fetch(right, other)
    with pytest.raises(ValueError, match="could not be had"):
        download.fetch(right._replace(address=right.address + ".gone"), other)
    monkeypatch.setattr(download, "MAX_BYTES", 5)
    with pytest.raises(ValueError, match="longer than 5 bytes"):
        download.fetch(right, other)
    assert list(other.iterdir()) == []


def test_a_download_without_a_network_ends_with_a_sentence(tmp_path):
    command = [sys.executable, ROOT / "data" / "download.py", "mnist", tmp_path]
    dead = {**os.environ, "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    ended = subprocess.run(command, capture_output=True, text=True, env=dead)
    assert ended.returncode == 2 and "could not be had" in ended.stderr and "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []
