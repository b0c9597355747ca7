"""Where a result comes from: the commit of the code, what was changed since, and DVC's hashes of the artifacts behind it."""

import os
import subprocess
from pathlib import Path

import yaml

DECIDES = ("params.yaml", "dvc.yaml", "requirements.lock", "stages", "tessera")  # a change of these may change results


def tags(root: Path, outs: dict[str, Path]) -> dict[str, str]:
    """Tags for a tracker; `outs`: artifacts by role, of which dvc.lock knows the hash. What is unknown is left out."""
    found = {}
    if commit := _git(root, "rev-parse", "HEAD"):
        found["mlflow.source.git.commit"] = commit  # the name under which MLflow shows it
        if changed := _git(root, "diff", "--name-only", "HEAD", "--", *DECIDES):
            found["git.uncommitted"] = ", ".join(changed.splitlines())
    if experiment := os.environ.get("DVC_EXP_NAME"):
        found["dvc.experiment"] = experiment
    return found | {f"dvc.{role}": text for role, text in _locked(root, outs).items()}


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _locked(root: Path, outs: dict[str, Path]) -> dict[str, str]:
    """By role, the stage that made an artifact and its md5 in dvc.lock: "train_prior@vqgan-flow 1b2c....dir"."""
    try:
        text = (root / "dvc.lock").read_text(encoding="utf-8")
        stages = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))["stages"]  # noqa: S506  both are safe
        made = {out["path"]: f"{stage} {out['md5']}" for stage, one in stages.items() for out in one.get("outs", ())}
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return {}
    return {role: made[path.as_posix()] for role, path in outs.items() if path.as_posix() in made}
