"""The card of an exported system: README.md with what it is, how good it is by which protocol, and how to use it.

Its head is what the Hugging Face Hub reads (YAML between two lines of ---).
"""

from typing import Any

import yaml

from tessera.components import load, sets
from tessera.contracts import ImageSpec
from tessera.export import layout
from tessera.params import Pipeline

GROUPS = ("generation", "reconstruction", "prior", "codebook")  # of the metrics, in this order
LABELS_SHOWN = 20


def text(
    params: Pipeline, name: str, images: ImageSpec, figures: dict[str, Any] | None, *, has_grid: bool, has_onnx: bool
) -> str:
    """figures: data/metrics/systems/NAME.json, or None where the system was not evaluated."""
    system = params.systems[name]
    tokenizer = params.tokenizers[system.tokenizer]
    sections = [
        f"---\n{yaml.safe_dump(_head(params, images), sort_keys=False, allow_unicode=True)}---",
        f"# {params.dataset.name}-{name}",
        f"Draws images of {images.channels} x {images.height} x {images.width} pixels like those of the data set "
        f"{images.name}. Tokenizer: {tokenizer.kind}, prior: {system.prior.kind}.",
        f"![samples, as they came](./{layout.GRID})" if has_grid else "",
        _use(images, system.prior, has_onnx),
        _labels(images),
        _told(system.prior),
        _guide(system.prior),
        _figures(figures),
        f"## Data and licence\n\nTrained on {images.name}. Licence of its images: {images.licence}. What it means for the "
        "weights is for their publisher to say here.",
        _made(params, name),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(params: Pipeline, images: ImageSpec) -> dict[str, Any]:
    task = (
        {"pipeline_tag": "unconditional-image-generation"} if images.num_classes == 1 else {}
    )  # the Hub has none of labels
    return {
        "library_name": "tessera",
        **task,
        "license": "other",
        "license_name": "see-card",
        "datasets": [params.dataset.name],
        "tags": ["image-generation", "vector-quantization", "two-stage"],
    }


def _use(images: ImageSpec, prior: Any, has_onnx: bool) -> str:
    before, asked = _asked(images, prior)
    lines = [
        "## Use",
        "```python",
        "import tessera",
        *before[:1],
        "",
        'system = tessera.load("FOLDER")  # this one',
        *before[1:],
        f"images = system.sample({asked}, seed=1)  # (B, C, H, W) {_dtype(images)}",
        "tokens = system.encode(images)",
        'system.pictures(system.decode(tokens))[0].save("one.png")'
        if images.channels in (1, 3) and not (sets(images, "bits") and images.channels == 3)
        else "system.decode(tokens)",
        "```",
        "",
        "From the Hub and to it, with `huggingface_hub`: `hf download OWNER/NAME --local-dir FOLDER`, "
        "`hf upload OWNER/NAME FOLDER`.",
    ]
    if has_onnx:
        lines += [
            "",
            f"`{layout.ONNX}/` holds the encoder, the decoder and one step of the prior, of {_rows(prior)}, for "
            "onnxruntime.",
        ]
    return "\n".join(lines)


def _dtype(images: ImageSpec) -> str:
    return "uint16" if sets(images, "bits") else "uint8"


def _rows(prior: Any) -> str:
    """What the `labels` of prior.onnx are."""
    is_told = sets(prior, "condition") and not getattr(prior.condition, "replaces_label", False)
    return "labels and what is told beside them, in rows" if is_told else "labels"


def _asked(images: ImageSpec, prior: Any) -> tuple[list[str], str]:
    """Lines of Python that come before, an import first, and the arguments of `sample`, which draws two images or four."""
    plain = "labels=[0, 0]" if images.num_classes > 1 else "labels=[0] * 4"
    if not sets(prior, "condition") or getattr(prior.condition, "replaces_label", False):
        return [], plain
    condition = prior.condition
    name = load("conditions", condition.kind).NAME
    if name == "captions":
        return [], 'captions=["one", "two"], labels=[0, 0]'
    if name == "attributes":
        middle = {column: (low + high) / 2 for column, (low, high) in condition.numbers.items()}
        first = {column: values[0] for column, values in condition.categories.items()}
        return [], f"attributes=[{middle | first}] * 2, labels=[0, 0]"
    if name == "embeddings":
        return [], f"embeddings=[[0.5] * {condition.embedding_dim}] * 2, labels=[0, 0]"
    if name != "pictures":
        return [], plain if getattr(prior, "label_dropout", 0.0) else f"{name}=[..., ...], labels=[0, 0]"
    if condition.file_channels is None and (images.channels not in (1, 3) or sets(images, "bits")):
        shape = f"2, {images.channels}, {images.height}, {images.width}"
        return ["import torch"], f"pictures=torch.zeros({shape}, dtype=torch.{_dtype(images)}), labels=[0, 0]"
    of_files = ", are_told=True" if condition.file_channels is not None else ""
    shown = f'pictures = system.preprocess([Image.open("picture.png")] * 2{of_files})'
    return ["from PIL import Image", shown], "pictures=pictures, labels=[0, 0]"


def _labels(images: ImageSpec) -> str:
    if images.num_classes == 1:
        return ""
    if list(images.class_names) == [str(label) for label in range(images.num_classes)]:
        return f"Labels: 0 to {images.num_classes - 1}, named so."
    named = [f"{label} {name}" for label, name in enumerate(images.class_names[:LABELS_SHOWN])]
    more = [f"and {images.num_classes - LABELS_SHOWN} more"] if images.num_classes > LABELS_SHOWN else []
    return f"Labels: {', '.join([*named, *more])}."


def _told(prior: Any) -> str:
    """What of it was told in the place of a label, and how to tell it."""
    if not sets(prior, "condition"):
        return ""
    said = load("conditions", prior.condition.kind).card(prior.condition)
    if getattr(prior.condition, "replaces_label", False):
        return said
    rest = (
        "Any of these may be left out."
        if getattr(prior, "label_dropout", 0.0)
        else "Leave out nothing that every image was told."
    )
    return f"{said} {rest}"


def _guide(prior: Any) -> str:
    """How to use the worse version that it keeps, where it does."""
    if not sets(prior, "guide"):
        return ""
    return (
        "Beside the weights of its prior lie those of an early snapshot, for autoguidance: `system.sample(..., "
        "autoguidance_scale=1.5)` leads away from it; 1 is off."
    )


def _figures(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return "## Figures\n\nIt was not evaluated: `dvc repro` of its checkout does so."
    rows = ["| metric | value | error | images | against | network |", "| --- | --- | --- | --- | --- | --- |"]
    for group in GROUPS:
        for key, one in sorted(figures.get(group, {}).items()):
            protocol = figures["protocols"].get(one["protocol"], {})
            against = f"{protocol.get('num_reference_images', 0):,} {protocol.get('reference_split', '')}"
            error = "" if one["standard_error"] is None else f"{one['standard_error']:.4g}"
            rows.append(
                f"| {group}/{key} | {one['value']:.4g} | {error} | {one['num_images']:,} | "
                f"{against if protocol.get('num_reference_images') else ''} | {protocol.get('network', '')} |"
            )
    return "\n".join(
        [
            "## Figures",
            "",
            f"error: standard error over other draws; the whole protocols are in [{layout.METRICS}](./{layout.METRICS}).",
            "",
            *rows,
        ]
    )


def _made(params: Pipeline, name: str) -> str:
    system = params.systems[name]
    settings = {
        "tokenizer": params.tokenizers[system.tokenizer].model_dump(mode="json"),
        "prior": system.prior.model_dump(mode="json"),
        "sampling": params.sampling(name).model_dump(mode="json"),
    }
    listed = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    said = f"By the pipeline of Tessera, with these settings and seed {params.seed}:"
    return f"## How it was made\n\n{said}\n\n```yaml\n{listed}```"
