"""Kronecker attention on small arrays, under masks told to library and oracle apart.

Arguments and results are arrays of NumPy: what a test does with them compiles nothing.
"""

import itertools
from typing import Any, NamedTuple

import jax
import numpy as np

from softlib import attention, masks
from softlib.testing import assert_close
from tests.host import jnp
from tests.oracles import masks as pairs
from tests.oracles.kronecker import kronecker_attention as dense

attend: Any = attention.kronecker_attention
PerAxis: Any = masks.PerAxis
Between: Any = masks.Between


class Shape(NamedTuple):
    """`S` has a length per key axis."""

    T: int = 11
    S: tuple[int, ...] = (7, 9)
    H: int = 4
    E: int = 3
    N: int = 4
    K: int = 2
    B: int = 2

    @property
    def order(self) -> int:
        return 1 + len(self.S)

    @property
    def terms(self) -> int:
        """Of the longest sum: over all tuples, or over rows and all other axes."""
        return max(self.N * self.T, *self.S, 1) * int(np.prod(self.S)) + 1


class Given(NamedTuple):
    """A mask as keyword arguments of the library, and as tuples that attend."""

    options: dict[str, Any]
    allowed: Any


def problem(shape=None, dtype="float32", *, scale=None, seed=0) -> dict[str, Any]:
    """Rounded arrays by name, with scores of a few units; `scale` may be "traced"."""
    T, S, H, E, N, K, B = shape or Shape()
    random = np.random.default_rng(seed)
    draw = lambda *shape: np.asarray(random.normal(size=shape), jnp.dtype(dtype))
    arrays: dict[str, Any] = {
        "query": draw(B, T, N, H),
        "keys": tuple(draw(B, s, K, H) for s in S),
        "values": tuple(draw(B, s, K, E) for s in S),
    }
    if scale == "traced":
        wide = "float64" if dtype == "float64" else "float32"
        arrays["scale"] = np.asarray(1.3 * H**-0.5, wide)
    return arrays


def no_third(query, *keys):
    """A joint condition without closed form."""
    return (query + sum(keys)) % 3 != 0


def mask(name, shape) -> Given:
    """A mask by name; `late`, `segments` and `padding` leave rows without a tuple."""
    T, S, _, _, _, _, B = shape
    m = len(S)
    if name == "none":
        return Given({}, True)
    if name == "causal":  # one mask for every axis
        return Given({"mask": masks.Causal()}, grid(shape, [pairs.causal()] * m))
    if name == "windows":
        reaches = list(
            itertools.islice(itertools.cycle([(3, 0), (1, 1), (None, 2)]), m)
        )
        axes = [masks.Window(*reach) for reach in reaches]
        definitions = [pairs.window(*reach) for reach in reaches]
        return Given({"mask": PerAxis(*axes)}, grid(shape, definitions))
    if name == "radial":
        axes = [masks.Radial(2 + t, t % 2) for t in range(m)]
        definitions = [pairs.radial(2 + t, t % 2) for t in range(m)]
        return Given({"mask": PerAxis(*axes)}, grid(shape, definitions))
    if name == "late":  # the last axis alone has no key for the first half of the rows
        axes = [*[None] * (m - 1), masks.Causal(-T // 2)]
        definitions = [*[None] * (m - 1), pairs.causal(-T // 2)]
        return Given({"mask": PerAxis(*axes)}, grid(shape, definitions))
    if name == "joint":
        axes = [masks.Causal(2), *[None] * (m - 1)]
        definitions = [pairs.causal(2), *[None] * (m - 1)]
        value = PerAxis(*axes, joint=no_third)
        return Given({"mask": value}, grid(shape, definitions, no_third))
    if name == "between":  # every unordered set of keys once; of one axis: causal
        steps = [(t + 1, t) for t in range(1, m)] or [(0, 1)]
        joint = tuple(Between(*step, masks.Causal(-1)) for step in steps)
        ordered = lambda *index: all(index[b] < index[a] for a, b in steps)
        value = PerAxis(*[None] * m, joint=joint if m > 2 else joint[0])
        return Given({"mask": value}, grid(shape, [None] * m, ordered))
    if name == "several":
        joint = (
            no_third,
            Between(0, m, ~masks.Window(0, 0)),
            Between(0, 1, masks.All()),
        )
        unequal = lambda *index: no_third(*index) and index[0] != index[m]
        value = PerAxis(*[masks.Window(None, 4)] * m, joint=joint)
        return Given({"mask": value}, grid(shape, [pairs.window(None, 4)] * m, unequal))
    if name == "segments":
        # The last id of the queries stands alone. Only some axes have batched ids.
        ids = lambda n, b: (np.arange(n) + 2 * b) * 4 // (n + 2 * B)
        query = np.stack([np.minimum(ids(T, b), 2) for b in range(B)])
        query[:, -1] = 9
        keys = [
            np.stack([ids(s, b * (t != 1)) for b in range(B)]) for t, s in enumerate(S)
        ]
        axes = [
            masks.Segments(*map(jax.device_put, (query, k[0] if t == 1 else k)))
            for t, k in enumerate(keys)
        ]
        same = [query[:, :, None] == k[:, None, :] for k in keys]
        return Given({"mask": PerAxis(*axes)}, product(same)[:, None])
    assert name == "padding"
    # The first entry has no key on the last axis; queries end early in the second.
    query = np.arange(B) * T // 2 % (T + 1) + T * (np.arange(B) % 2 == 0)
    lengths = [(s + np.arange(B)) // 2 for s in S]
    lengths[-1][0] = 0
    axes = [
        masks.Padding(*map(jax.device_put, (query if t == 0 else None, length)))
        for t, length in enumerate(lengths)
    ]
    inside = [
        (np.arange(T)[None, :, None] < query[:, None, None])
        & (np.arange(s)[None, None, :] < length[:, None, None])
        for s, length in zip(S, lengths, strict=True)
    ]
    return Given({"mask": PerAxis(*axes)}, product(inside)[:, None])


def grid(shape, definitions, joint=None):
    """(1, 1, T, S1, ..., Sm): each axis by its definition, then all indices."""
    axes = [
        np.ones((shape.T, s), bool)
        if keeps is None
        else pairs.dense(keeps, range(shape.T), range(s))
        for keeps, s in zip(definitions, shape.S, strict=True)
    ]
    found = product([axis[None] for axis in axes])[0]
    if joint is not None:
        for index in np.ndindex(found.shape):
            found[index] &= bool(joint(*index))
    return found[None, None]


def product(axes):
    """(B, T, S1, ..., Sm) of a (B, T, S_t) per axis."""
    m = len(axes)
    found = np.ones((1,) * (2 + m), bool)
    for t, axis in enumerate(axes):
        ones = [axis.shape[2] if u == t else 1 for u in range(m)]
        found = found & axis.reshape(*axis.shape[:2], *ones)
    return found


def oracle(arrays, **options):
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), arrays)
    return dense(**wide, **options)


def cotangents(arrays, seed=1):
    """Of both results; that of the output rounded as the library gets it."""
    random = np.random.default_rng(seed)
    query, value = arrays["query"], arrays["values"][0]
    g_out = random.normal(size=(*query.shape[:-1], value.shape[-1]))
    g_lse = random.normal(size=query.shape[:-1])
    return np.asarray(np.asarray(g_out, query.dtype), np.float64), g_lse


def attended(arrays, traced=None, **options):
    """(out, lse), compiled; `traced` are keyword arguments that are operands."""

    @jax.jit
    def call(arrays, traced):
        return attend(**arrays, **traced, return_lse=True, **options)

    return jax.device_get(call(arrays, traced or {}))


def with_gradients(arrays, g_out, g_lse, traced=None, **options):
    """(out, lse) and the gradients of all arrays, compiled."""

    @jax.jit
    def call(arrays, traced, g_out, g_lse):
        function = lambda arrays: attend(**arrays, **traced, return_lse=True, **options)
        results, pull = jax.vjp(function, arrays)
        given = (g_out, g_lse)
        cast = (g.astype(r.dtype) for g, r in zip(given, results, strict=True))
        (gradients,) = pull(type(results)(*cast))
        return results, gradients

    return jax.device_get(call(arrays, traced or {}, g_out, g_lse))


def assert_gradients(gradients, expected, arrays, *, dtype, length, c=4.0):
    """All of them, by name; each has the dtype of its array."""
    assert gradients.keys() == arrays.keys()
    for name in arrays:
        own, wanted, given = (
            x[name] if isinstance(x[name], tuple) else (x[name],)
            for x in (gradients, expected, arrays)
        )
        for one, two, array in zip(own, wanted, given, strict=True):
            assert one.dtype == array.dtype
            # Of the scale, a sum over everything.
            terms = length * 8 if name == "scale" else length
            assert_close(one, two, dtype=dtype, length=terms, c=c)
