"""The run of a system in the tracker: what people compare, and the model that it offers to the registry."""

import hashlib
import json
import os
from pathlib import Path

from tessera.artifacts import folder as artifact
from tessera.evaluation.figures import Measured
from tessera.params import Pipeline
from tessera.running import progress
from tessera.tracking import journal, provenance
from tessera.tracking.mirror import SECONDS

ROOT = Path(os.environ.get("DVC_ROOT", "."))  # stages run there; DVC sets it


def publish(
    params: Pipeline,
    name: str,
    measured: Measured,
    files: dict[str, Path | None],
    images: Path,
    parts: dict[str, Path],
) -> None:
    """The one run per system that people compare in the tracker: both stages' params, all figures, the pictures.

    With both artifacts it is also offered to the registry of models.
    """
    experiment = f"tessera-{params.dataset.name}"
    described = params.describe(f"system@{name}")
    tags = {"tessera.system": name, **_protocol_tags(measured), **provenance.tags(ROOT, parts)}
    made_by = [f"train_{role}@{path.name}" for role, path in parts.items()] + [f"sample_images@{name}"]
    taken = progress.seconds()
    tags[SECONDS] = (
        f"{sum(taken.get(stage, 0.0) for stage in made_by):.1f}"  # else the tracker would show how long this function takes
    )
    with journal.open_run(
        name,
        experiment=experiment,
        root=ROOT,
        state=None,
        params=described.params,
        tags=described.tags | tags,
        settings=described.settings,
        kind="system",
    ) as run:
        track_dataset(run, params.dataset.name, images, "evaluation")
        for group, some in measured.groups.items():
            run.figures({f"{group}/{key}": one.value for key, one in some.items()})
            if group == "generation":  # what differences between systems are weighed by
                errors = {key: one.standard_error for key, one in some.items() if one.standard_error is not None}
                run.figures({f"{group}/{key}_standard_error": error for key, error in errors.items()})
        for file_name, file in files.items():
            if file is not None:
                run.attach(file, file_name)
        run.attach_json(described.settings, "params.json")
        run.attach_json({key: one.model_dump() for key, one in measured.protocols.items()}, "protocol.json")
        prints = {role: artifact.fingerprint(path) for role, path in parts.items()}
        run.made_by(prints)
        if len(parts) == 2:
            sampling = params.sampling(name).model_dump(mode="json")
            digest = hashlib.sha256(json.dumps([prints, sampling], sort_keys=True).encode()).hexdigest()
            run.offer_model(experiment, parts, prints, sampling, digest)


def _protocol_tags(measured: Measured) -> dict[str, str]:
    """What must be equal where figures of samples are compared: the main distance's protocol, and one short hash of all."""
    of_samples = {key: measured.protocol(key).model_dump() for key in measured.groups["generation"]}
    main = next(iter(of_samples.values()))
    digest = hashlib.sha256(json.dumps(of_samples, sort_keys=True).encode()).hexdigest()[:12]
    shown = ("num_images", "reference_split", "num_reference_images", "network", "dtype")
    return {"protocol": digest, **{f"protocol.{key}": str(main[key]) for key in shown}}


def track_dataset(run: journal.Run, name: str, images: Path, context: str) -> None:
    """Tell the tracker which images artifact goes into a run."""
    run.dataset(name, artifact.fingerprint(images), images.as_posix(), context)
