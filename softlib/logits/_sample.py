"""Exact samples of classes, drawn without forming the probabilities of a row."""

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from softlib._array_arguments import array_arguments
from softlib._sharding import in_auto_mode, match_varying
from softlib.typing import AxisName, PerRow

from ._engine import sampling
from ._engine.sampling import Kept
from ._engine.vocabulary_parallel import first_class
from ._modifiers import checked_per_row
from ._source_rows import collapsed
from ._sources import Logits, Source, source_of, with_temperature
from ._stored import StoredLogits
from ._top_k import require_forward_stream


@array_arguments
def sample(
    key: Array,
    logits: Logits,
    *,
    temperature: PerRow | None = None,
    min_p: PerRow | None = None,
) -> Int[Array, "*batch"]:
    r"""One class per row, drawn with the probabilities of the softmax.

    $$\arg\max_j \, (z_j + g_j), \qquad g_j \sim \mathrm{Gumbel}(0, 1)$$

    has the law of `jax.random.categorical`. A linear head finds the maximum in a stream
    over the classes: a token of a vocabulary of 256,000 is drawn without the logits of
    its row. The noise is a function of the key, the index of the row and the class. So
    equal keys give equal classes (except for ties to within rounding) for chunks of any
    size, for a head and its `materialize()`, and for classes divided over devices.
    Appended rows do not change the others.

    Args:
        key: PRNG key of any generator, typed or raw. `jax.shard_map` counts rows on
            each device: if it divides rows, fold `jax.lax.axis_index` into the key, or
            devices share their noise.
        logits: An array of logits, or a value such as `softlib.LinearLogits`, whose
            `implementation` must be None or "xla" and `gradient_filter_eps` None.
        temperature: Divides the logits; positive, a number or an array that is a scalar
            or one value per row. The logits must have none of their own. For the
            temperature 0 take `top_k` with `k=1`.
        min_p: In $(0, 1]$, a number or an array as `temperature`. Classes with less
            than `min_p` times the largest probability, at this temperature, are not
            drawn. At 1 only the likeliest classes are left, to within rounding.

    Returns:
        Class ids, int32. A class with logit -inf, or that `class_where` excludes, is
        never drawn; -1 for a row without other classes, or with a NaN or +inf.

    Raises:
        TypeError: An argument has the wrong kind of dtype.
        ValueError: Shapes do not fit together, a number is out of range, both the
            logits and the call have a temperature, or an option of the logits has no
            meaning here.

    Derivatives: none, the classes are integers.
    Cost: for a linear head a forward pass of `row_statistics` and the noise, which
        takes a CPU as long as the products of some 250 features, a quarter of the time
        of `jax.random.gumbel`; scratch of a few tiles. With `min_p` one more forward
        pass. For an array scratch of twice its size.
    Source: the Gumbel-max trick; noise by counters as in "Parallel Random Numbers: As
        Easy as 1, 2, 3"; "Turning Up the Heat: Min-p Sampling for Creative and Coherent
        LLM Outputs".

    Example:
        >>> table = jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> logits = softlib.LinearLogits(9 * jnp.eye(2), table)
        >>> print(softlib.logits.sample(jax.random.key(0), logits, temperature=0.5))
        [0 1]
    """
    source = source_of("sample", logits)
    require_forward_stream(source)
    if temperature is not None:
        source = with_temperature(source, temperature)
    log_share = _log_share(source, min_p)
    words = sampling.key_words(key)
    if isinstance(source, StoredLogits):
        best, classes = _of_array(source, words, log_share)
    else:
        best, classes = _of_head(source, words, log_share)
    if log_share is not None:
        best = jnp.where(jnp.isnan(log_share), jnp.nan, best)
    return jnp.where(best < jnp.inf, classes, -1)


def _of_array(
    source: StoredLogits, words: Array, log_share: Array | None
) -> tuple[Array, Array]:
    batch = source.batch_shape

    def draw(z: Array, words: Array, log_share: Array | None) -> tuple[Array, Array]:
        z = collapsed(z, batch)
        kept = None
        if log_share is not None:
            kept = Kept(z.max(-1), collapsed(log_share, batch))
        best, classes = sampling.drawn_of_array(z, words, kept)
        return best.reshape(batch), classes.reshape(batch)

    rows = lambda spec: PartitionSpec(*spec[: len(batch)])
    specs = lambda spec: (rows(spec), rows(spec))
    z = lax.stop_gradient(source.materialize())
    return in_auto_mode(draw, specs, z, words, log_share)


def _of_head(
    source: Source, words: Array, log_share: Array | None
) -> tuple[Array, Array]:
    source = source.prepared()
    batch, options, axis_name = source.batch_shape, source.options, source.axis_name
    first = jnp.zeros((), jnp.int32)
    if axis_name is not None:
        first = first_class(axis_name, source.own_classes).astype(jnp.int32)

    def draw(_, source, words, first, log_share):
        head = lax.stop_gradient(match_varying(source.operand(), first))
        kept = None
        if log_share is not None:
            top = _greatest(sampling.max_logits(options, head), axis_name)
            # Logits of two streams may differ by a rounding or two.
            slack = 8 * jnp.finfo(top.dtype).eps * jnp.abs(top)
            kept = Kept(top, collapsed(log_share, batch) - slack)
            kept = match_varying(kept, head.like)
        found = sampling.drawn_of_head(options, head, words, first, kept)
        return tuple(array.reshape(batch) for array in found)

    rows = lambda spec: PartitionSpec(*spec[: len(batch)])
    specs = lambda spec: (rows(spec), rows(spec))
    best, classes = in_auto_mode(
        draw, specs, source.per_row, source, words, first, log_share
    )
    if axis_name is None:
        return best, classes
    top = _greatest(best, axis_name)
    here = jnp.where(best == top, classes, jnp.iinfo(jnp.int32).max)
    return top, lax.pmin(here, axis_name)


def _greatest(
    values: Float[Array, "*batch"], axis_name: AxisName | None
) -> Float[Array, "*batch"]:
    """Maximum over devices; +inf for NaN, which a collective may lose."""
    if axis_name is None:
        return values
    return lax.pmax(jnp.where(jnp.isnan(values), jnp.inf, values), axis_name)


def _log_share(source: Source, min_p: PerRow | None) -> Array | None:
    """Logarithm of `min_p` of each row; NaN stays."""
    if min_p is None:
        return None
    if isinstance(min_p, int | float) and not 0 < min_p <= 1:
        raise ValueError(f"{source.function}: `min_p` must be in (0, 1], got {min_p}.")
    batch, dtype = source.batch_shape, source.dtype
    share = checked_per_row(source.function, "min_p", min_p, batch, dtype)
    assert share is not None
    log_share = jnp.log(jnp.clip(share.astype(dtype), 0, 1))
    return jnp.broadcast_to(lax.stop_gradient(log_share), batch)
