"""Text models of the package transformers: made here, tiny and untrained, as people have trained ones in a folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tiny_text_models
import torch

from tessera.artifacts.captions import Captions, examples_of
from tessera.artifacts.tokens import Tokens
from tessera.bases.captions import encoded
from tessera.components import parse
from tessera.conditions import text_model
from tessera.conditions.text_model import OfTextFeatures, as_float16
from tessera.features import clip
from tessera.metrics.clip_score import score
from tessera.running.job import Job
from tessera.sources import text_models
from tessera.training import told
from tessera.training.told import ToldTokens


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    pytest.importorskip("transformers")
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            tiny_text_models.save(name, made[name])
        return made[name]

    return make


def config_of(folder: Path, **changes: Any) -> text_model.Config:
    line = text_models.lines(folder)
    values = dict(pair.split(": ") for pair in line.removeprefix("condition: {").rstrip("}\n").split(", "))
    found = {key: int(value) if key in ("feature_dim", "max_tokens") else value for key, value in values.items()}
    return parse(text_model.Config, found | changes)


@pytest.mark.parametrize("name", ["bert", "t5", "clip"])
def test_a_caption_is_what_the_network_that_reads_makes_of_it_alone(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    """By the package itself, without padding; of an image and text model and of an encoder and decoder as well."""
    import transformers

    folder = folder_of(name)
    config = config_of(folder)
    assert (config.feature_dim, config.max_tokens) == (16, 12)
    told = text_model.encoded(config, ["a red square", "", "七 a a a"], torch.tensor([4, 0, 1]))
    assert told.shape == (3, 1 + 12 * 16) and told[:, 0].tolist() == [5, 1, 2]
    features = told[:, 1:].view(3, 12, 16)
    whole = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    reader = {"bert": whole, "t5": getattr(whole, "encoder", None), "clip": getattr(whole, "text_model", None)}[name]
    for row, numbers in ((0, [2, 4, 5, 7, 3]), (2, [2, 9, 4, 4, 4, 3])):
        with torch.no_grad():
            expected = reader(input_ids=torch.tensor([numbers])).last_hidden_state[0]
        torch.testing.assert_close(features[row, : len(numbers)], expected, atol=1e-5, rtol=1e-4)
        assert not features[row, len(numbers) :].any()
    assert not features[1].any()


def test_what_cannot_be_read_is_refused_in_one_sentence(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    good = folder_of("bert")
    config = config_of(good)

    def planned(longest: int, text: str = "a red") -> Any:
        said = type("Said", (), {"longest_caption": longest, "longest_text": text})
        return type("Planned", (), {"said": said})

    assert list(text_model.problems(config, planned(9))) == []
    (found,) = text_model.problems(config, planned(40, "a " * 20))
    assert "has 22 tokens; write max_tokens: 22, or shorten it" in found
    assert "the images have no captions" in next(text_model.problems(config, planned(0)))
    wrong = {
        "has fingerprint": config.model_copy(update={"sha256": "0" * 64}),
        "write feature_dim: 16": config.model_copy(update={"feature_dim": 8}),
        "takes 12: expected at most as many, write max_tokens: 12": config.model_copy(update={"max_tokens": 64}),
        "has no config.json": config.model_copy(update={"folder": str(tmp_path)}),
    }
    for sentence, changed in wrong.items():
        (found,) = text_model.problems(changed, planned(9))
        assert sentence in found and len(found.splitlines()) == 1
    with pytest.raises(ValueError, match="has 13 tokens, expected at most max_tokens 12: say it in fewer words"):
        text_model.encoded(config, ["a " * 11])
    pickled = tmp_path / "pickled"
    shutil.copytree(good, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin, a pickle, which is never opened, but no safetensors"):
        text_models.fingerprint(pickled)
    wordless = tmp_path / "wordless"
    shutil.copytree(good, wordless)
    (wordless / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer: expected one of tokenizer.json, vocab.json"):
        text_models.lines(wordless)
    changed = tmp_path / "changed"
    shutil.copytree(good, changed)
    weights = safetensors.torch.load_file(changed / "model.safetensors")
    safetensors.torch.save_file({name: one + 1 for name, one in weights.items()}, changed / "model.safetensors")
    assert text_models.fingerprint(changed) != text_models.fingerprint(good) == config.sha256
    own = json.loads((changed / "config.json").read_text()) | {
        "model_type": "mine",
        "auto_map": {"AutoModel": "x.Mine"},
    }
    (changed / "config.json").write_text(json.dumps(own))
    (changed / "x.py").write_text("raise SystemExit('the code of a folder was run')")
    with pytest.raises(ValueError, match="is of no model that transformers knows"):
        text_models.lines(changed)
    with pytest.raises(ValueError, match="reach 7e.04, expected at most 65504"):
        as_float16(np.array([7e4], np.float32), "a red square")


def test_clip_reads_images_and_captions_as_its_own_processor_does(
    folder_of: Callable[[str], Path], image_spec: Any
) -> None:
    import transformers

    folder = folder_of("clip")
    config = parse(
        clip.Config, {"kind": "clip", "folder": str(folder), "sha256": text_models.fingerprint(folder), "prompt": ""}
    )
    spec = image_spec.model_copy(update={"channels": 3, "height": 8, "width": 8})
    model = clip.Model(config, spec)
    clip.prepare(model, config)
    whole = transformers.CLIPModel.from_pretrained(folder, local_files_only=True).eval()
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    given = transformers.CLIPImageProcessor.from_pretrained(folder)(images=list(pixels), return_tensors="pt")
    words = transformers.AutoTokenizer.from_pretrained(folder)(
        ["a red square", "七"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = whole(**words, pixel_values=given["pixel_values"])
    seen, read = model.features(pixels.float() / 127.5 - 1), model.of_captions(encoded(["a red square", "七"], 32))
    torch.testing.assert_close(torch.nn.functional.normalize(seen, dim=1), expected.image_embeds, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(read, expected.text_embeds, atol=1e-5, rtol=1e-4)
    assert model.feature_dim == 8 and (model.resize, model.has_logits) == ("bicubic to 8x8, antialiased", False)
    assert score(np.array([0.4, -0.4])).tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="has fingerprint .*, expected sha256 0000"):
        clip.prepare(model, config.model_copy(update={"sha256": "0" * 64}))
    for name in ("bert", "t5"):
        with pytest.raises(ValueError, match="is of no image and text model"):
            clip.Model(config.model_copy(update={"folder": str(folder_of(name))}), spec)


class Interrupted(Exception):
    pass


def test_features_are_computed_once_survive_a_kill_and_are_those_of_what_is_drawn(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(folder_of("bert"))
    said = [[f"a {'red' if row % 2 else 'blue'} {'a ' * (row % 7)}"] for row in range(29)] + [[]]
    monkeypatch.setattr("tessera.conditions.text_model.AT_ONCE", 3)
    monkeypatch.setattr("tessera.artifacts.shards.SHARD_BYTES", 4 * 12 * 16 * 2)
    read, asked = text_models.TextModel.features, []

    def counting(self: Any, captions: list[str], most: int) -> torch.Tensor:
        if len(asked) == 9:
            asked.append("")
            raise Interrupted
        asked.extend(captions)
        return read(self, captions, most)

    monkeypatch.setattr(text_models.TextModel, "features", counting)
    of_images = OfTextFeatures(Captions(said), config, "train")
    assert len(of_images.every) == 14
    job = Job("train_prior@x", tmp_path / "state")
    with pytest.raises(Interrupted):
        of_images.compute(job)
    again = OfTextFeatures(Captions(said), config, "train")
    again.compute(job)
    assert sorted(set(asked) - {""}) == again.every and len(asked) <= 14 + 1 + 3  # at most a shard anew
    labels = torch.arange(30) % 4
    rows = again.told(torch.arange(30), torch.Generator().manual_seed(0), labels)
    monkeypatch.undo()
    expected = text_model.encoded(config, [each[0] if each else "" for each in said], labels)
    torch.testing.assert_close(rows, expected, atol=2e-3, rtol=2e-3)
    assert rows[29, 0] == 2 and not rows[29, 1:].any()


def test_a_training_computes_what_it_is_told(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(folder_of("bert"))
    tokens: Any = Tokens.__new__(Tokens)
    tokens.values, tokens.split, tokens.labels, tokens.rows = np.zeros(2), "train", np.zeros(2, np.int64), np.arange(2)
    captions = Captions([["a red square"], ["a blue circle"]])
    monkeypatch.setattr("tessera.artifacts.captions.read", lambda images, split: captions)
    splits = told.told_tokens(config, {"train": tokens}, tmp_path)
    assert isinstance(splits["train"], ToldTokens)
    with pytest.raises(RuntimeError, match="before they were computed"):
        splits["train"].told(torch.arange(2), None)
    told.compute(splits, Job("train_prior@x", tmp_path / "state"))
    assert splits["train"].told(torch.arange(2), None).shape == (2, 1 + 12 * 16)
    told.write_examples(tmp_path, config, {**splits, "test": splits["train"]}, 0)
    assert {one.caption for one in examples_of(tmp_path)} == {"a red square", "a blue circle"}
