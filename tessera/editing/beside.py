"""What some edits take beside images and settings: the one place where a caller's words become an edit's arguments."""

from typing import Any, NamedTuple

from torch import Tensor

HALFWAY = 0.5  # from an image to the other one


USES = {"mask": ("inpaint",), "other": ("interpolate", "restyle"), "share": ("interpolate",)}


def require_used(kind: str, **given: bool) -> None:
    """Raises ValueError for what was given and the edit has no use for: mask, other, share."""
    for name, is_given in given.items():
        if is_given and kind not in USES[name]:
            raise ValueError(f"{kind} has no use for {name}: leave it out; it is for {' and '.join(USES[name])}")


class Beside(NamedTuple):
    """Given for an edit of B images; what it has no use for is not looked at."""

    size: tuple[int, int]  # (H, W) of the system's images
    mask: Tensor | None = None  # (B, H, W) booleans, True where pixels are to be drawn anew
    others: Tensor | None = (
        None  # (B, C, H, W), in [-1, 1]: images to go to; of restyle the first, whose look is wanted
    )
    share: float = HALFWAY  # of the way to the others

    def arguments(self, kind: str) -> tuple[Any, ...]:
        """As the `edit` of tessera/edits/KIND.py takes them, behind all that every edit takes."""
        if kind == "inpaint":
            return (self.mask,)
        if kind == "enhance":
            return (self.size,)
        if kind == "interpolate":
            return self.others, self.share
        if kind == "restyle" and self.others is not None:
            return (self.others[0],)
        return ()
