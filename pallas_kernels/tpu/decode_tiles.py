"""Options of the decode kernel, and block sizes from a cost model."""

import dataclasses
import math

import jax
from jax import lax

from pallas_kernels._devices import Tpu

LANES = 128
# Seconds that the pipeline of a grid adds to a step, and the largest share of a step.
STEP, STEP_SHARE = 0.4e-6, 1 / 8
# Share of vector memory for blocks: double buffers of each array, and one more of each
# for the second pass.
SHARE, COPIES = 0.5, 3
SLACK_BYTES = 4 << 20
# Lanes of a chunk: enough for products to take longer than starting them.
CHUNK = 2048


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of the blocks of keys.

    Attributes:
        keys: Keys of a block, a multiple of `chunk`.
        chunk: Keys that are processed at a time; times the heads a multiple of 128.
    """

    keys: int
    chunk: int

    def __str__(self) -> str:
        return f"blocks of {self.keys} keys"


@dataclasses.dataclass(frozen=True)
class Form:
    """Options of a call: Python values, each of which makes another kernel.

    Attributes:
        heads: Key heads; row `r` of `rows` queries reads head `r // (rows // heads)`.
        softcap: c in c * tanh(z / c); None for none.
        unified: Whether sums are relative to the reference phi.
        elementwise: Whether every score must lie in the valid range, not just the
            largest of a row.
        falls_back: Whether the kernel recomputes rows out of range.
        precision: Precision of both products.
    """

    heads: int
    softcap: float | None = None
    unified: bool = False
    elementwise: bool = False
    falls_back: bool = True
    precision: tuple[lax.Precision, lax.Precision] = (lax.Precision.HIGHEST,) * 2


def choose_tiles(
    rows: int,
    keys: int,
    heads: int,
    features: tuple[int, int],
    sizes: tuple[int, int],
    device: Tpu,
) -> Tiles | None:
    """The smallest blocks whose time dominates that of a grid step.

    Copying a block of b bytes takes b / bandwidth. Smaller blocks waste less behind the
    end of a sequence, while this is many times the cost of a step of the grid.

    Args:
        rows: Rows of queries of all heads.
        keys: Most keys of a sequence.
        heads: Key heads.
        features: Features of a key and of a value.
        sizes: Bytes per element of keys and of values.
        device: The program's device.

    Returns:
        None if nothing fits.
    """
    unit = math.lcm(LANES, heads) // heads
    widths = [up(width, LANES) for width in features]
    per_key = heads * sum(w * size for w, size in zip(widths, sizes, strict=True))
    chunk = unit * max(1, CHUNK // (unit * heads))
    most = int(SHARE * device.vmem_bytes) // (COPIES * per_key)
    wanted = int(STEP * device.bytes_per_second / STEP_SHARE) // per_key
    wanted = min(wanted, most, keys)
    if min(most, keys) < unit:
        return None
    if wanted < chunk:
        chunk = max(wanted // unit, 1) * unit
    return Tiles(max(wanted // chunk, 1) * chunk, chunk)


def vmem_bytes(tiles: Tiles, *arrays: jax.Array) -> int:
    numbers = (up(x.shape[3], LANES) * x.dtype.itemsize for x in arrays)
    per_row = COPIES * sum(numbers)
    return tiles.keys * arrays[0].shape[2] * per_row + SLACK_BYTES


def up(n: int, multiple: int) -> int:
    return math.ceil(n / multiple) * multiple
