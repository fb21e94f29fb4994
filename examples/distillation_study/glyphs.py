"""Letters and digits in the fonts that come with matplotlib, shifted and noisy.

Students and teachers see some fonts and are asked about others. O, 0 and o, or l, I and
1, are hard to tell apart: what a teacher says of the wrong classes has a meaning.
"""

import pathlib
import string
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.ft2font import FT2Font

CHARACTERS = string.ascii_letters + string.digits
SIZE = 16
COPIES = 4
CREDIT = "glyphs of the DejaVu and STIX fonts in matplotlib's package"
HELD_OUT = (
    "DejaVuSans-Oblique",
    "DejaVuSerif-Bold",
    "DejaVuSansMono",
    "STIXGeneralBol",
)


class Images(NamedTuple):
    """Images (N, SIZE * SIZE) in about [-1, 2], and the numbers of their characters."""

    pixels: np.ndarray
    labels: np.ndarray

    def at(self, step: int, batch: int, seed: int) -> "Images":
        random = np.random.default_rng([seed, step])
        rows = random.integers(0, len(self.labels), min(batch, len(self.labels)))
        return Images(self.pixels[rows], self.labels[rows])

    def few(self, shots: int, seed: int) -> "Images":
        """`shots` images of every class."""
        random = np.random.default_rng([seed, 7])
        rows = [
            random.permutation(np.flatnonzero(self.labels == k))[:shots]
            for k in range(len(CHARACTERS))
        ]
        chosen = np.concatenate(rows)
        return Images(self.pixels[chosen], self.labels[chosen])


def load(seed: int) -> tuple[Images, Images]:
    """Training images, and held-out ones of other fonts."""
    fonts = pathlib.Path(mpl.get_data_path()) / "fonts" / "ttf"
    train, held_out = [], []
    for path in sorted(fonts.glob("*.ttf")):
        drawn = _font(path)
        if drawn is not None:
            (held_out if path.stem in HELD_OUT else train).append(drawn)
    random = np.random.default_rng([seed, 3])
    return _jittered(train, random), _jittered(held_out, random)


def _font(path: pathlib.Path) -> np.ndarray | None:
    """(62, SIZE, SIZE), or None for a font without these characters."""
    font = FT2Font(str(path))
    font.set_size(SIZE * 0.7, 72)
    known = font.get_charmap()
    images = []
    for character in CHARACTERS:
        if ord(character) not in known:
            return None
        font.set_text(character)
        font.draw_glyphs_to_bitmap()
        drawn = np.asarray(font.get_image(), np.float32)[:SIZE, :SIZE] / 255
        if drawn.max(initial=0) == 0:
            return None
        image = np.zeros((SIZE, SIZE), np.float32)
        y, x = ((SIZE - length) // 2 for length in drawn.shape)
        image[y : y + drawn.shape[0], x : x + drawn.shape[1]] = drawn
        images.append(image)
    return np.stack(images)


def _jittered(fonts: list[np.ndarray], random: np.random.Generator) -> Images:
    pixels, labels = [], []
    for drawn in fonts:
        for _ in range(COPIES):
            for label, image in enumerate(drawn):
                moved = np.roll(image, random.integers(-1, 2, 2), (0, 1))
                moved = moved * random.uniform(0.7, 1.3)
                pixels.append(moved + random.normal(0, 0.25, image.shape))
                labels.append(label)
    flat = np.stack(pixels).reshape(len(labels), -1).astype(np.float32)
    return Images(flat, np.array(labels, np.int32))
