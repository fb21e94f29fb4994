"""Options of the decode kernel, and block sizes from a model of what they cost."""

import dataclasses
import math

import jax
from jax import lax

from pallas_kernels._devices import Tpu

LANES = 128
# Seconds that the pipeline of a grid adds to a step, and the share it may have in it.
STEP, STEP_SHARE = 0.4e-6, 1 / 8
# Of vector memory, for blocks: two of each array in use or on their way, one of each
# for the second pass.
SHARE, COPIES = 0.5, 3
SLACK_BYTES = 4 << 20
# Lanes of a chunk: enough for its products to last longer than to start them.
CHUNK = 2048


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of the blocks of keys.

    Attributes:
        keys: Of a block; a multiple of `chunk`.
        chunk: Keys whose scores are worked on at a time. Times the heads a multiple of
            128.
    """

    keys: int
    chunk: int

    def __str__(self) -> str:
        return f"blocks of {self.keys} keys"


@dataclasses.dataclass(frozen=True)
class Form:
    """Options of one call: Python values, of which each makes a kernel of its own.

    Attributes:
        heads: Of keys; row `r` of `rows` queries reads head `r // (rows // heads)`.
        logit_softcap: c in c * tanh(z / c); None for none.
        unified: Whether sums are relative to the reference phi.
        elementwise: Whether every score must lie in the valid range, not just the
            largest of a row.
        falls_back: Whether rows that have left the range are done again in the kernel.
        precision: Of the product of queries and keys, and of weights and values.
    """

    heads: int
    logit_softcap: float | None = None
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
    """The smallest blocks in which the step of a grid does not count.

    Copying a block of b bytes takes b / bandwidth; where that is many times what a step
    of the grid costs, a smaller block wastes less behind the end of a sequence.

    Args:
        rows: Of queries, of all heads.
        keys: Of a sequence, at most.
        heads: Of keys.
        features: Of a key and of a value.
        sizes: Bytes of a number of a key and of a value.
        device: What it is for.

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
