"""The weights of a published network, from a local file that is taken only if it is the very file that was meant.

A figure such as FID is defined by its weights, so params name a file together with its sha256. Nothing is downloaded
here and no pickle is opened; `data/download.py` does both, when the user calls it.
"""

from pathlib import Path

from torch import Tensor, nn

from tessera.artifacts import folder as artifact
from tessera.artifacts.checkpoints import read_weights
from tessera.artifacts.folder import ArtifactError


def read(path: Path, sha256: str, keys: tuple[str, str], expected: str, remedy: str) -> dict[str, Tensor]:
    """Tensors of a safetensors file by name. Raises ValueError if it is missing, another file, or no safetensors.

    keys: the params that name the file and its sha256; expected: whose weights it should hold; remedy: how to get them.
    """
    if not path.is_file():
        raise ValueError(f"{keys[0]}: {path} does not exist, expected {expected} as safetensors. {remedy}")
    digest = artifact.sha256(path)
    if digest != sha256:
        raise ValueError(
            f"{keys[0]}: {path} has sha256 {digest}, expected {keys[1]} {sha256}: get the file again, "
            f"or set {keys[1]} if you trust this one"
        )
    try:
        return read_weights(path)
    except ArtifactError as error:
        raise ValueError(f"{keys[0]}: {error}. {remedy}") from None


def fill(network: nn.Module, weights: dict[str, Tensor], path: Path, key: str, expected: str, remedy: str) -> None:
    """Put the weights that were read into the network. Raises ValueError, naming the first tensor that does not fit."""
    try:
        network.load_state_dict(weights, strict=True)
    except RuntimeError:
        wanted, found = ({name: tuple(t.shape) for name, t in d.items()} for d in (network.state_dict(), weights))
        wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        wrong = [name for name in wrong if not name.endswith("num_batches_tracked")]  # old files do without
        raise ValueError(
            f"{key}: {path} holds the weights of another network ({wrong[0]} has shape {found.get(wrong[0])}, "
            f"expected {wanted.get(wrong[0])}; {len(wrong) - 1} others differ), expected {expected}. {remedy}"
        ) from None
