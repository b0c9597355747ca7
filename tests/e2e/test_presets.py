"""The presets for GPUs and the zoo, but for what would take hours on a CPU: steps, images, depth, bf16, torch.compile, and
the width of the largest tokenizer.

A CPU without instructions for bf16 emulates it, 10 to 80 times slower; test_components.py trains every part in it, and
compiled.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from stages import encode_tokens, sample_images, train_prior, train_tokenizer
from tessera.artifacts import folder as artifact
from tessera.artifacts.images import ImageWriter, write_meta
from tessera.contracts import ImageSpec
from tessera.params import read
from tessera.running.job import Job

pytestmark = pytest.mark.e2e(seconds=40)
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("preset", ["cifar10", "imagenet256", "zoo"])
def test_every_part_of_a_preset_takes_steps_on_generated_images_of_its_shape(preset, tmp_path):
    raw = yaml.safe_load((ROOT / f"presets/{preset}.yaml").read_text())
    few = {"num_steps": 2, "batch_size": 2, "gradient_accumulation": 1, "precision": "fp32", "compile": False}
    for part in (*raw["tokenizers"].values(), *(system["prior"] for system in raw["systems"].values())):
        if "training" in part:
            part["training"] |= few
        for sizes in (part, part.get("denoiser", {})):
            if "depth" in sizes:
                sizes["depth"] = 2
    if preset == "imagenet256":
        raw["tokenizers"]["vqgan"]["channels"] //= 4  # minutes, for the same layers and 256x256 pixels
    raw["tokenizers"]["vqgan"]["discriminator_start_step"] = 1
    raw["tokenizers"]["vqgan"]["quantizer"]["init_step"] = 1
    raw["encode_tokens"] |= {"warps": 0, "batch_size": 2}
    raw["sample_images"] = {"num_images": 2, "batch_size": 2}
    raw["follow_training"]["num_images"] = 2
    if preset == "imagenet256":  # a look would sample 256x256 pixels in its prior's usual number of steps
        raw["follow_training"]["every"] = 0
    for system in raw["systems"].values():
        system["sampling"] |= {key: 2 for key in ("num_steps", "decoding_steps") if key in system["sampling"]}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    params = read(tmp_path / "params.yaml")
    images = generated_images(tmp_path / "images", params.dataset)
    for name in params.tokenizers:
        folder, curve = tmp_path / "tokenizers" / name, tmp_path / f"{name}.csv"
        train_tokenizer.run(params, name, images, folder, curve, Job(f"t{name}", tmp_path / f"t{name}"))
        encode_tokens.run(
            params, name, images, folder, tmp_path / "tokens" / name, Job(f"e{name}", tmp_path / f"e{name}")
        )
    assert "real_logits" in (tmp_path / "vqgan.csv").read_text()  # the discriminator took part
    for name, system in params.systems.items():
        tokenizer, tokens = tmp_path / "tokenizers" / system.tokenizer, tmp_path / "tokens" / system.tokenizer
        prior, out = tmp_path / f"prior-{name}", tmp_path / f"samples-{name}"
        paths = (images, tokenizer, tokens, prior, tmp_path / "p.csv", tmp_path / "p.json")
        figures = train_prior.run(params, name, *paths, Job(name, tmp_path / name))
        assert np.isfinite(figures["test_loss"]) if system.prior.kind != "gan" else figures == {}
        assert (prior / "looks/step-0000002.png").exists() == (params.follow_training.every > 0)
        sample_images.run(params, name, tokenizer, prior, out, tmp_path / "grid.png", Job("samples", tmp_path / "s4"))
        drawn = np.load(out / "images-00000.npy")
        assert drawn.shape == (2, params.dataset.channels, params.dataset.height, params.dataset.width)


def generated_images(out: Path, dataset) -> Path:
    """Three images to train on and two to test, of ten classes, of smooth noise."""
    spec = ImageSpec(
        name="generated",
        channels=dataset.channels,
        height=dataset.height,
        width=dataset.width,
        num_classes=10,
        class_names=tuple("0123456789"),
        licence="none",
    )
    random = np.random.default_rng(0)
    with artifact.create(out) as place:
        for split, count in (("train", 3), ("test", 2)):
            coarse = random.integers(0, 255, (count, spec.channels, spec.height // 8, spec.width // 8)).astype(np.uint8)
            with ImageWriter(place, split, spec) as writer:
                writer.append(coarse.repeat(8, axis=2).repeat(8, axis=3), np.arange(count) % 10)
        write_meta(place, spec, "0" * 64, pd.DataFrame({"split": ["train"] * 3 + ["test"] * 2, "kept": True}))
    return out
