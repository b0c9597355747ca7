"""Stages in the process of a test, one after another, with the files that dvc.yaml names, below a folder."""

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from tessera.params import Pipeline
from tessera.running.job import Job

GRAPH = yaml.safe_load((Path(__file__).parents[1] / "dvc.yaml").read_text())["stages"]


def made_small(raw: dict[str, Any]) -> dict[str, Any]:
    """What presets/emoji.yaml says, in sizes for which a pipeline takes seconds; changed in place, returns its prior."""
    training = {"num_steps": 8, "batch_size": 8}
    for judge in raw["features"].values():
        judge |= {"channels": 8, "feature_dim": 16, "training": training}
    raw["tokenizers"]["vqgan"] |= {"channels": 16, "num_blocks": 1, "discriminator_start_step": 4, "training": training}
    raw["encode_tokens"] |= {"warps": 1, "batch_size": 16}
    raw["sample_images"] = {"num_images": 20, "batch_size": 8}
    raw["edit_images"] = {"num_images": 4, "num_seeds": 1, "batch_size": 4}
    for metric in raw["evaluate"]["metrics"].values():
        metric |= {"neighbors": 2, "density_neighbors": 2} if metric["kind"] == "precision_recall" else {}
    raw["evaluate"]["metrics"]["brightness"] = {"kind": "brightness"}
    prior = raw["systems"]["vqgan-flow"]["prior"]
    return prior | {"denoiser": {"kind": "transformer", "width": 32, "depth": 1, "heads": 2}, "training": training}


class Stages:
    """What `dvc repro` would do below `root` under some params, but for what is done to be sure, to resume and to track."""

    def __init__(self, params: Pipeline, root: Path):
        self.params, self.root = params, root

    def run(self, *entries: str) -> Any:
        """The entries, e.g. train_prior@vqgan-flow; what the last one returns."""
        found = None
        for entry in entries:
            stage, *arguments = self._command(entry)
            named, options = arguments[:1], arguments[1:]
            if not named or named[0].startswith("--"):
                named, options = [], arguments
            paths = {
                option.removeprefix("--").replace("-", "_"): self.root / path
                for option, path in zip(options[::2], options[1::2], strict=True)
            }
            job = Job(entry.replace("@", " "), self.root / ".state" / entry.replace("@", "-"))
            found = importlib.import_module(f"stages.{stage}").run(self.params, *named, **paths, job=job)
        return found

    def tokenize(self, tokenizer: str) -> None:
        """All that priors of one tokenizer are trained and judged with."""
        self.run("prepare_images")
        for name in self.params.features:
            self.run(f"train_features@{name}", f"reference_stats@{name}")
        self.run(*(f"{stage}@{tokenizer}" for stage in ("train_tokenizer", "encode_tokens", "evaluate_tokenizer")))

    def _command(self, entry: str) -> list[str]:
        """The stage, and what stands behind it."""
        name, _, key = entry.partition("@")
        body = GRAPH[name]
        text = (body["do"] if "foreach" in body else body)["cmd"].replace("${key}", key)
        if key in self.params.systems:
            text = text.replace("${item.tokenizer}", self.params.systems[key].tokenizer)
        return shlex.split(re.sub(r"^exec python -m tessera\.running ", "", text))
