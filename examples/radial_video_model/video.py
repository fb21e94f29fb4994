"""A real clip as patches, and as the few numbers that a model sees of each patch."""

import dataclasses
import lzma
import pathlib

import numpy as np
from language_model.failures import Failure, reason

CREDIT = "Big Buck Bunny, (c) 2008 Blender Foundation, www.bigbuckbunny.org, CC BY 3.0"
FRAMES, ROWS, COLUMNS, PATCH = 128, 11, 20, 8
GRID = (ROWS, COLUMNS)
PLACES = ROWS * COLUMNS
PIXELS = PATCH * PATCH * 3


def load(path: pathlib.Path) -> np.ndarray:
    """Patches (frames, places, pixels) in [0, 1]; the file holds frame differences."""
    try:
        content = lzma.decompress(path.read_bytes())
    except OSError as error:
        raise Failure(f"cannot read {path}: {reason(error)}.") from error
    except lzma.LZMAError as error:
        raise Failure(f"{path} is not a whole xz file: {error}.") from error
    size = FRAMES * PLACES * PIXELS
    if len(content) != size:
        raise Failure(f"{path} must hold {size:,} bytes, got {len(content):,}.")
    difference = np.frombuffer(content, np.uint8).reshape(
        FRAMES, ROWS, PATCH, COLUMNS, PATCH, 3
    )
    video = np.cumsum(difference, axis=0, dtype=np.uint8)  # modulo 256, as stored
    patches = video.transpose(0, 1, 3, 2, 4, 5).reshape(FRAMES, PLACES, PIXELS)
    return patches.astype(np.float32) / 255


def picture(patches: np.ndarray) -> np.ndarray:
    """One frame as an image (height, width, 3)."""
    grid = patches.reshape(ROWS, COLUMNS, PATCH, PATCH, 3).transpose(0, 2, 1, 3, 4)
    return np.clip(grid.reshape(ROWS * PATCH, COLUMNS * PATCH, 3), 0, 1)


@dataclasses.dataclass(frozen=True)
class Codec:
    """Patches as principal components of what differs from the still background.

    The camera does not move: the mean training frame is the background, and all that
    is left to predict is what moves in front of it.
    """

    background: np.ndarray
    basis: np.ndarray
    scale: float

    @classmethod
    def fit(cls, patches: np.ndarray, components: int) -> "Codec":
        background = patches.mean(0)
        moving = (patches - background).reshape(-1, PIXELS)
        basis = np.linalg.eigh(moving.T @ moving)[1][:, ::-1][:, :components]
        return cls(background, basis, float((moving @ basis).std()))

    def encode(self, patches: np.ndarray) -> np.ndarray:
        """(..., places, components), of variance 1 over the training frames."""
        return ((patches - self.background) @ self.basis / self.scale).astype("f4")

    def decode(self, latents: np.ndarray) -> np.ndarray:
        return latents * self.scale @ self.basis.T + self.background
