"""Links in folders from elsewhere: what is opened in a folder is to lie in it."""

from pathlib import Path

from tessera.artifacts.folder import ArtifactError


def require_no_way_out(folder: Path) -> None:
    """Raises ArtifactError for a link that leads out of the folder, but for those of huggingface_hub's cache."""
    within = [folder.resolve()]
    # models--OWNER--NAME/snapshots/REVISION/..., whose files lie in models--OWNER--NAME/blobs
    within += [(parent.parent / "blobs").resolve() for parent in folder.parents if parent.name == "snapshots"]
    for path in folder.rglob("*"):
        if path.is_symlink() and not any(path.resolve().is_relative_to(root) for root in within):
            raise ArtifactError(
                f"{path} leads out of {folder}, to {path.resolve()}: expected a file of the folder's own"
            )
