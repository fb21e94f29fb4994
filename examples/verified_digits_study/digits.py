"""Digits in the fonts that come with matplotlib: moved, turned, blurred, noisy."""

import dataclasses
import functools
import pathlib
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.ft2font import FT2Font
from scipy import ndimage

SIZE = 20
DIGITS, LETTERS = "0123456789", "ABEGJKPRTZ"
# Fonts that show other signs in the place of digits.
SYMBOLS = ("LastResortHE-Regular", "cmex10", "cmmi10", "cmsy10")
HELD_OUT = ("DejaVuSerif", "DejaVuSansMono-Oblique", "STIXGeneralBol", "cmtt10")


class Images(NamedTuple):
    """Images (N, SIZE * SIZE) and the digits they show; -1 for what is none."""

    pixels: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Condition:
    """How images differ from those that trained.

    Attributes:
        turn: Degrees by which all are turned, to either side.
        blur: Standard deviation in pixels.
        noise: Standard deviation where black is 1.
        held_out: Whether the fonts are others.
        letters: Whether letters are shown and no digits.
        skewed: Whether ones and sevens are as frequent as all others.
    """

    turn: float = 0.0
    blur: float = 0.0
    noise: float = 0.15
    held_out: bool = False
    letters: bool = False
    skewed: bool = False


CONDITIONS = {
    "as in training": Condition(),
    "1 and 7 frequent": Condition(skewed=True),
    "other fonts": Condition(held_out=True),
    "turned by 20°": Condition(turn=20),
    "turned by 45°": Condition(turn=45),
    "blurred": Condition(blur=1.2),
    "noisier": Condition(noise=0.4),
    "letters": Condition(letters=True),
}


def draw(count: int, condition: Condition, seed: tuple[int, int]) -> Images:
    """Images of a condition, independent draws of font, digit and disturbance."""
    random = np.random.default_rng(seed)
    fonts = glyphs(LETTERS if condition.letters else DIGITS)
    names = [name for name in fonts if (name in HELD_OUT) == condition.held_out]
    shares = np.ones(10)
    if condition.skewed:
        shares[[1, 7]] = 4
    labels = random.choice(10, count, p=shares / shares.sum())
    pixels = np.zeros((count, SIZE, SIZE), np.float32)
    for row, label in enumerate(labels):
        image = fonts[names[random.integers(len(names))]][label]
        angle = random.uniform(-10, 10)
        angle += random.choice([-1, 1]) * condition.turn
        image = _moved(
            image, angle, random.uniform(0.85, 1.15), random.uniform(-2, 2, 2)
        )
        pixels[row] = ndimage.gaussian_filter(image, condition.blur)
    pixels += random.normal(0, condition.noise, pixels.shape).astype(np.float32)
    if condition.letters:
        labels = np.full_like(labels, -1)
    return Images(pixels.reshape(count, -1), labels.astype(np.int32))


def _moved(
    image: np.ndarray, degrees: float, zoom: float, shift: np.ndarray
) -> np.ndarray:
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = np.full(2, (SIZE - 1) / 2)
    matrix = turn / zoom
    return ndimage.affine_transform(
        image, matrix, centre - matrix @ (centre + shift), order=1
    )


@functools.cache
def glyphs(characters: str) -> dict[str, np.ndarray]:
    """By the name of the font (10, SIZE, SIZE), of fonts that have all of them."""
    folder = pathlib.Path(mpl.get_data_path()) / "fonts" / "ttf"
    found = {}
    for path in sorted(folder.glob("*.ttf")):
        if path.stem in SYMBOLS:
            continue
        font = FT2Font(str(path))
        font.set_size(SIZE, 72)
        known = font.get_charmap()
        if all(ord(character) in known for character in characters):
            images = [_image(font, character) for character in characters]
            if all(image.any() for image in images):
                found[path.stem] = np.stack(images)
    return found


def _image(font: FT2Font, character: str) -> np.ndarray:
    font.set_text(character)
    font.draw_glyphs_to_bitmap()
    drawn = np.asarray(font.get_image(), np.float32)[:SIZE, :SIZE] / 255
    image = np.zeros((SIZE, SIZE), np.float32)
    y, x = ((SIZE - length) // 2 for length in drawn.shape)
    image[y : y + drawn.shape[0], x : x + drawn.shape[1]] = drawn
    return image
