"""What a prior draws when it is told a combination that no training image had: by factor, beside chance and seen ones.

    python -m benchmarks.combinations --seeds 0 1 2 --priors autoregressive masked flow_matching [--plain] [--steps 1500]

Pictures of 32x32 hold one figure: 4 shapes x 4 colours x 4 places, a little moved, larger or smaller, darker or lighter. A
fifth of the 64 combinations is held out, another fifth for each seed, every single value staying in training. Captions name
the three in words ("a red square at the top left"). What is drawn is measured by its pixels: the colour by the nearest of the
four, the place by the centre of the figure, the shape by the best of the four templates in its box; on the images themselves
all three are right. --plain: by the pooled caption alone, without attention to its bytes.
"""

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from stages import encode_tokens, prepare_images, train_prior, train_tokenizer
from tessera import seeding
from tessera.artifacts import checkpoints, pictures
from tessera.artifacts import images as image_artifact
from tessera.artifacts.images import to_float, to_uint8
from tessera.components import parse
from tessera.editing import words
from tessera.params import Pipeline
from tessera.running.job import Job
from tessera.system import System

SIDE, EACH, EACH_DRAWN, HELD_OUT = 32, 40, 10, 13  # pixels; images and samples of a combination; combinations
COLOURS = {"red": (210, 40, 40), "green": (40, 160, 60), "blue": (50, 70, 220), "black": (30, 30, 30)}
SHAPES = ("square", "circle", "triangle", "cross")
PLACES = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}
PRESET = Path(__file__).parents[1] / "presets/emoji.yaml"  # what is not set here
FACTORS = ("shape", "colour", "place")
SAMPLING = {"autoregressive": {}, "masked": {"decoding_steps": 16}, "flow_matching": {"num_steps": 12}}
Combination = tuple[str, str, str]  # shape, colour, place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--priors", nargs="+", default=list(SAMPLING), choices=list(SAMPLING))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument(
        "--times", type=float, nargs=2, default=(0.0, 1.0), help="flow_matching: time_mean and time_std"
    )
    parser.add_argument("--pictures", type=Path, help="a folder for grids, a row for each combination")
    asked = parser.parse_args()
    print("| prior | seed | combinations | " + " | ".join(FACTORS) + " | all three | chance |")
    print("| --- " * (5 + len(FACTORS)) + "|")
    for seed in asked.seeds:
        with tempfile.TemporaryDirectory() as folder:
            trial(Path(folder), seed, asked)


def trial(root: Path, seed: int, asked: argparse.Namespace) -> None:
    held_out = held_out_of(seed)
    params = params_of(drawn_into(root / "source", held_out, seed), seed, asked)

    def job(name: str) -> Job:
        quiet = Job(name, root / "state" / name)
        quiet.say = lambda text: None
        return quiet

    images, tokenizer, tokens = root / "images", root / "tokenizer", root / "tokens"
    prepare_images.run(params, images, job("prepare_images"))
    train_tokenizer.run(params, "vqvae", images, tokenizer, root / "t.csv", job("train_tokenizer"))
    encode_tokens.run(params, "vqvae", images, tokenizer, tokens, job("encode_tokens"))
    print_row("tokenizer alone", seed, "all", agreements(*reconstructed(images, tokenizer)))
    for name in params.systems:
        began, prior = time.perf_counter(), root / "priors" / name
        train_prior.run(params, name, images, tokenizer, tokens, prior, root / "p.csv", root / "p.json", job(name))
        seconds = time.perf_counter() - began
        system = System.read(tokenizer, prior, name)
        for group, some in (("seen", set(every()) - held_out), ("held out", held_out)):
            asked_for = sorted(some)
            made = drawn(system, params.sampling(name), asked_for, seed)
            if asked.pictures:
                pictures.save_grid(asked.pictures / f"{name}-{seed}-{group.replace(' ', '-')}.png", made, EACH_DRAWN)
            agreement = agreements(made, asked_for)
            print_row(f"{name} ({seconds:.0f} s)", seed, group, agreement)


def print_row(name: str, seed: int, group: str, agreement: list[float]) -> None:
    cells = " | ".join(f"{value:.3f}" for value in agreement)
    print(f"| {name} | {seed} | {group} | {cells} | .25 each, .016 |", flush=True)


@torch.no_grad()
def reconstructed(folder: Path, tokenizer: Path) -> tuple[np.ndarray, list[Combination]]:
    """A training image of each combination, through the tokenizer, and what it shows: as far as a prior can get."""
    _, splits = image_artifact.read(folder)
    first: dict[Combination, np.ndarray] = {}
    for image in splits["train"].pixels.all():
        first.setdefault(measured(image), image)
    model, _, _ = checkpoints.load_model(tokenizer, "tokenizers")
    decoded = model.decode(model.encode(to_float(torch.from_numpy(np.stack(list(first.values()))))).latents)
    return to_uint8(decoded).numpy(), list(first)


def every() -> list[Combination]:
    return list(itertools.product(SHAPES, COLOURS, PLACES))


def held_out_of(seed: int) -> set[Combination]:
    """A fifth of all; whatever value of a factor is taken, a combination with each value of another is trained on."""
    order = seeding.numpy_generator(seed, "held_out").permutation(len(every()))
    found: set[Combination] = set()
    for number in order:
        candidate = found | {every()[number]}
        left = set(every()) - candidate
        pairs = {(one[i], one[j]) for one in left for i, j in itertools.combinations(range(3), 2)}
        if len(pairs) == 3 * 16 and len(candidate) <= HELD_OUT:
            found = candidate
    return found


def mask_of(shape: str, size: int) -> np.ndarray:
    """(size, size) booleans."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size * 2 - 1
    if shape == "circle":
        return x**2 + y**2 <= 1
    if shape == "triangle":  # upright
        return np.abs(x) <= (y + 1) / 2
    if shape == "cross":
        return (np.abs(x) <= 1 / 3) | (np.abs(y) <= 1 / 3)
    return np.ones((size, size), bool)


def drawn_into(folder: Path, held_out: set[Combination], seed: int) -> Path:
    random, rows = seeding.numpy_generator(seed, "combinations"), []
    folder.mkdir()
    for number, (combination, _) in enumerate(itertools.product(every(), range(EACH))):
        shape, colour, place = combination
        size = int(random.integers(10, 14))
        top, left = (2 + 16 * half + int(random.integers(-1, 2)) for half in PLACES[place])
        pixels = np.full((SIDE, SIDE, 3), 245.0)
        tone = np.array(COLOURS[colour]) * random.uniform(0.85, 1.15)
        pixels[top : top + size, left : left + size][mask_of(shape, size)] = tone
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:05d}.png")
        split = "test" if combination in held_out else "train"
        rows.append({"file_name": f"{number:05d}.png", "text": caption_of(combination), "split": split})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def caption_of(combination: Combination) -> str:
    shape, colour, place = combination
    return f"a {colour} {shape} at the {place}"


def params_of(source: Path, seed: int, asked: argparse.Namespace) -> Pipeline:
    condition = {"kind": "caption", "max_bytes": 40, "cross_attention": not asked.plain}
    training = {"num_steps": asked.steps, "batch_size": 48, "optimizer": "muon"}
    sizes = {"width": 96, "depth": 3, "heads": 3}
    of_prior: dict[str, dict[str, Any]] = {
        "autoregressive": sizes,
        "masked": sizes,
        "flow_matching": {
            "denoiser": {"kind": "transformer", **sizes},
            "time_mean": asked.times[0],
            "time_std": asked.times[1],
        },
    }
    systems = {
        name.replace("_", "-"): {
            "tokenizer": "vqvae",
            "prior": {"kind": name, **of_prior[name], "training": training, "condition": condition},
            "sampling": {**SAMPLING[name], "guidance_scale": asked.guidance},
        }
        for name in asked.priors
    }
    quantizer = {"kind": "vector", "codebook_size": 128, "code_dim": 8}
    tokenizer = {"kind": "vqvae", "quantizer": quantizer, "patch_size": 4, "channels": 64, "num_blocks": 1}
    raw = yaml.safe_load(PRESET.read_text())
    columns = {"file": "metadata.jsonl", "captions": ["text"], "split": "split"}
    raw["seed"] = seed
    raw["dataset"] |= {"source": str(source), "height": SIDE, "width": SIDE, "metadata": columns}
    raw["features"] = {"random": {"kind": "random"}}
    raw["tokenizers"] = {"vqvae": {**tokenizer, "training": {"num_steps": 800, "batch_size": 32, "optimizer": "muon"}}}
    raw["encode_tokens"] |= {"warps": 0}
    raw["systems"] = systems
    return parse(Pipeline, raw)


@torch.no_grad()
def drawn(system: System, sampling: Any, combinations: list[Combination], seed: int) -> np.ndarray:
    """(N, C, H, W) uint8, EACH_DRAWN of each combination."""
    captions = [caption_of(one) for one in combinations for _ in range(EACH_DRAWN)]
    return words.draw(system, captions, sampling, seeding.generator(seed, "drawn", device=system.device))


def agreements(images: np.ndarray, combinations: list[Combination]) -> list[float]:
    """The shares of the images, equally many of each combination, that have its shape, its colour, its place, and all three."""
    asked = [one for one in combinations for _ in range(len(images) // len(combinations))]
    right = np.array(
        [
            [a == b for a, b in zip(measured(one), wanted, strict=True)]
            for one, wanted in zip(images, asked, strict=True)
        ]
    )
    return [*right.mean(axis=0), right.all(axis=1).mean()]


def measured(image: np.ndarray) -> Combination:
    """(3, H, W) uint8 -> what it shows, as far as pixels say; a picture of nothing has the first of everything."""
    is_figure = image.min(axis=0) < 170
    if is_figure.sum() < 12:
        return every()[0]
    rows, columns = np.nonzero(is_figure)
    centre = (rows.mean() / SIDE, columns.mean() / SIDE)
    place = next(name for name, halves in PLACES.items() if halves == tuple(int(each >= 0.5) for each in centre))
    mean = image[:, is_figure].mean(axis=1)
    colour = min(COLOURS, key=lambda name: float(np.square(mean - np.array(COLOURS[name])).sum()))
    box = is_figure[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    rows_of_box, columns_of_box = ((np.arange(24) + 0.5) / 24 * side for side in box.shape)
    seen = box[np.ix_(rows_of_box.astype(int), columns_of_box.astype(int))]
    shape = max(SHAPES, key=lambda name: float((seen == mask_of(name, 24)).mean()))
    return shape, colour, place


if __name__ == "__main__":
    main()
