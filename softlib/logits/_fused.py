"""Linear combinations of the logits of several models, which are never formed."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from softlib import _checks as checks
from softlib._array_arguments import array_arguments, as_array
from softlib._dtypes import common_dtype
from softlib._sharding import in_auto_mode, match_varying
from softlib.typing import Implementations, PerRow, Scalar

from ._blockwise import BlockwiseLogits
from ._engine import operations, tilted
from ._engine.blocks import Blocks, Layout, modifier_layout
from ._engine.tile import NO_MODIFIERS, logits_of
from ._modified import blocks_of
from ._modifiers import checked_implementation, checked_modifiers, checked_options
from ._source_rows import Shape, all_of, collapsed, masked_modifiers
from ._sources import Logits, Source, source_of
from ._value import AbstractLogits


class _MemberTiles(NamedTuple):
    """The classes of a block that no member excludes, and each member's logits."""

    counts: Bool[Array, "rows classes"]
    logits: list[Array]


class FusedLogits(BlockwiseLogits):
    r"""A linear combination of the logits of several models, a value that losses take.

    With $z_i$ the final logits of member $i$ and $w_i$ its weight, the raw logits are

    $$\sum_i w_i z_i.$$

    Contrastive decoding is $(1 + \beta) z_{expert} - \beta z_{amateur}$, and a small
    tuned model steers a large one by $z_{large} + \alpha (z_{tuned} - z_{small})$. The
    members are read together, slice by slice: neither their logits nor the combination
    is ever an array. Heads of different widths and layouts, stored arrays, and other
    combinations may be members.

    A class that one member excludes, by `class_where` or a final logit of -inf, is
    excluded from the combination, whatever the weight: no NaN comes of 0 times
    infinity, or of infinity less infinity. After a `softcap` of the combination only
    `class_where` excludes, as in `LinearLogits`.

    Args:
        members: Arrays of logits or values such as `softlib.LinearLogits`, with the
            same rows and classes; their modifiers count.
        weights: One number per member, of any sign; or an array with one number per row
            and member. Differentiable.
        bias: Added to the scaled combination, one number per class; -inf is legal.
        scale: Multiplies the combination; a number, or an array that is a scalar or one
            value per row, differentiable.
        softcap: Static positive number $c$: logits become $c\tanh(u / c)$.
        temperature: Divides the capped logits; positive, as `scale` otherwise.
        class_where: True for the classes that exist, in addition to what the members
            say.
        vocab_chunk: Static number of classes per step; None takes the least that a
            member asks for, or chooses from the shapes.
        token_chunk: Static number of rows per step; None as in `vocab_chunk`.
        implementation: Static; see `softlib.explain`.

    Raises:
        TypeError: An argument has the wrong kind of dtype, or `members` is no sequence
            of logits.
        ValueError: Rows, classes or weights do not fit together, an option is out of
            range, or a member has `axis_name`, `gradient_filter_eps` or an
            `implementation` of its own, which a combination has not.

    Attributes:
        members: As values, without `class_where`, chunks and `implementation`, which
            the combination has.
        weights: As given, numbers as an array.
        bias, scale, softcap, temperature: As given, numbers as arrays.
        class_where: True for the classes that exist in all members, too.

    Derivatives: those of the function that takes it, with respect to `weights` and
        every floating array of the members; see `row_statistics`.
    Cost: that of the members' heads, in one stream; memory of a block of each. With a
        `class_where` per row in a member, that of all as an array of bools. Plain JAX
        on all platforms.
    Source: "On Giant's Shoulders: Effortless Weak to Strong by Dynamic Logits Fusion";
        "Contrastive Decoding: Open-ended Text Generation as Optimization".

    Example:
        >>> large = softlib.LinearLogits(jnp.eye(2), jnp.diag(jnp.array([2.0, 1.0])))
        >>> tuned, small = jnp.array([[1.0, 3.0], [0.0, 0.0]]), jnp.ones((2, 2))
        >>> members = (large, tuned, small)
        >>> fused = softlib.logits.FusedLogits(members, [1.0, 0.5, -0.5])
        >>> print(fused.materialize())
        [[ 2.   1. ]
         [-0.5  0.5]]
    """

    of_all = ("members", "weights", "exists")

    members: tuple[Source, ...]
    weights: Array
    # `class_where` as a part of the block; set in the operand only.
    exists: Bool[Array, "..."] | None

    @array_arguments
    def __init__(
        self,
        members: Sequence[Logits],
        weights: Sequence[Scalar] | Float[Array, "*batch members"],
        *,
        bias: Float[Array, " V"] | None = None,
        scale: PerRow | None = None,
        softcap: float | None = None,
        temperature: PerRow | None = None,
        class_where: Bool[Array, " V"] | None = None,
        vocab_chunk: int | None = None,
        token_chunk: int | None = None,
        implementation: Implementations = None,
    ) -> None:
        name = "FusedLogits"
        sources = _checked_members(name, members)
        chunks = {"vocab_chunk": vocab_chunk, "token_chunk": token_chunk}
        for option, size in chunks.items():
            if size is None:
                chunks[option] = _least(sources, option)
            else:
                checks.require_positive_integer(name, option, size)
        batch, classes = sources[0].batch_shape, sources[0].num_classes
        vars(self).update(
            function=name,
            members=tuple(map(_bare, sources)),
            weights=_checked_weights(name, weights, sources),
            exists=None,
            modifiers=NO_MODIFIERS,
            options=dataclasses.replace(checked_options(name, softcap), **chunks),
            implementation=checked_implementation(
                name, operations.BLOCKWISE, implementation
            ),
        )
        modifiers = checked_modifiers(
            name,
            batch,
            classes,
            self.dtype,
            (classes,),
            bias=bias,
            scale=scale,
            temperature=temperature,
            class_where=class_where,
        )
        where = all_of([modifiers.class_where, *(s.class_where for s in sources)])
        if where is not None and where.ndim > 1:
            where = jnp.broadcast_to(where, self.shape)
        self.modifiers = modifiers._replace(class_where=where)

    @property
    def batch_shape(self) -> Shape:
        return self.members[0].batch_shape

    @property
    def num_classes(self) -> int:
        return self.members[0].num_classes

    def layout(self) -> "FusedLogits":
        of_classes = NO_MODIFIERS._replace(class_where=self.exists)
        return self.replaced(
            members=tuple(member.layout() for member in self.members),
            weights=Layout(rows=self.weights.ndim > 1),
            exists=modifier_layout(of_classes).class_where,
            modifiers=modifier_layout(self.modifiers),
        )

    def masked(self, where: Bool[Array, "*batch"] | None) -> "FusedLogits":
        if where is None:
            return self
        weights = self.weights
        if weights.ndim > 1:
            weights = jnp.where(where[..., None], weights, 1)
        return self.replaced(
            members=tuple(member.masked(where) for member in self.members),
            weights=weights,
            modifiers=masked_modifiers(self.modifiers, where),
        )

    def prepared(self) -> "FusedLogits":
        """The combination of prepared members, which may exclude further classes."""
        members = [member.prepared() for member in self.members]
        where = all_of([self.class_where, *(m.class_where for m in members)])
        return self.replaced(
            members=tuple(map(_bare, members)),
            modifiers=self.modifiers._replace(class_where=where),
        )

    def operand(
        self, labels: Array | None = None, label_logits: Array | None = None
    ) -> Blocks:
        where = self.class_where
        if where is not None and where.ndim > 1:
            where = jnp.broadcast_to(where, self.shape)
        return blocks_of(self.replaced(exists=where), labels, label_logits)

    def tiles(self) -> _MemberTiles:
        """The classes of a block that no member excludes, and the members' logits.

        Final logits, which may be -inf where a class is excluded.
        """
        # The class_where of the members is a part of `exists`.
        tiles = [
            logits_of(member.block(), member.options, member.modifiers).z.astype(
                self.dtype
            )
            for member in self.members
        ]
        counts = all_of([self.exists, *(z != -jnp.inf for z in tiles)])
        assert counts is not None
        return _MemberTiles(counts, tiles)

    def block(self) -> Float[Array, "rows classes"]:
        counts, tiles = self.tiles()
        # Selected before the product, so that no derivative is 0 times infinity.
        weights = jnp.moveaxis(self.weights.astype(self.dtype), -1, 0)
        terms = [
            (weight[..., None] if weight.ndim else weight) * jnp.where(counts, z, 0)
            for weight, z in zip(weights, tiles, strict=True)
        ]
        return jnp.where(counts, sum(terms[1:], terms[0]), -jnp.inf)

    def finite_classes(self) -> Bool[Array, "..."] | None:
        if self.softcap is not None:
            return None
        own = super().finite_classes()
        return all_of([own, *(member.finite_classes() for member in self.members)])


def tilted_moments(
    fused: FusedLogits,
    from_second: Bool[Array, "*batch n"],
    weights: Float[Array, "*batch n directions"],
) -> tilted.Tilted:
    r"""Moments of distributions that lead from the first or the second member.

    With $z_i$ the logits of the members, those of a distribution are $z_0$ or $z_1$,
    plus the weighted directions $z_i - z_1$ for $i \geq 2$, over the classes that no
    member excludes. Members have no gradient here.

    Args:
        fused: Its members count, and the classes that it excludes.
        from_second: Whether a distribution leads from $z_1$ instead of $z_0$.
        weights: Of the directions.

    Returns:
        The logsumexp and the mean direction of each, (*batch, n, ...).
    """
    value = lax.stop_gradient(fused).prepared()
    batch, count = value.batch_shape, from_second.shape[-1]
    given = tilted.Tilts(from_second, weights.astype(value.dtype))

    def engine(_, value, given):
        rows = tilted.Tilts(*(collapsed(array, batch) for array in given))
        head, rows = match_varying((value.operand(), rows))
        found = tilted.moments(value.options, head, rows)
        return tilted.Tilted(
            found.lse.reshape(*batch, count),
            found.mean.reshape(*batch, count, -1),
        )

    def specs(spec):
        rows = spec[: len(batch)]
        lse: Any = PartitionSpec(*rows, None)
        mean: Any = PartitionSpec(*rows, None, None)
        return tilted.Tilted(lse, mean)

    return in_auto_mode(engine, specs, value.per_row, value, given)


def _checked_members(name: str, members: Sequence[Logits]) -> list[Source]:
    """The members as values, with the same rows and classes."""
    if isinstance(members, AbstractLogits) or not isinstance(members, Sequence):
        raise TypeError(
            f"{name}: `members` must be a sequence of logits, got "
            f"{type(members).__name__}."
        )
    if not members:
        raise ValueError(f"{name}: `members` must hold at least one, got none.")
    sources = [source_of(name, member, "members") for member in members]
    first = sources[0].shape
    for place, source in enumerate(sources):
        if source.shape != first:
            raise ValueError(
                f"{name}: `members` must have the same rows and classes, {first} of "
                f"the first, got {source.shape} of member {place}."
            )
        _require_plain(name, place, source)
    return sources


def _require_plain(name: str, place: int, source: Source) -> None:
    """Requires no option of a member that a combination lacks."""
    unknown = {
        "axis_name": source.axis_name,
        "gradient_filter_eps": source.options.gradient_filter_eps,
    }
    for option, value in unknown.items():
        if value is not None:
            raise ValueError(
                f"{name}: `{option}` of member {place} must be None, got {value!r}: a "
                "combination has none."
            )
    if source.implementation not in (None, "xla"):
        raise ValueError(
            f"{name}: `implementation` of member {place} must be None or 'xla', got "
            f"{source.implementation!r}: a combination has one for all its members."
        )


def _checked_weights(
    name: str, weights: Sequence[Scalar] | Array, sources: Sequence[Source]
) -> Array:
    dtype = common_dtype(*(source.dtype for source in sources))
    numbers = isinstance(weights, list | tuple) and all(
        isinstance(weight, int | float) and not isinstance(weight, bool)
        for weight in weights
    )
    if numbers:
        array = jnp.asarray(weights, dtype)
    else:
        array = as_array(name, "weights", weights)
        checks.require_floating(name, weights=array)
    count, batch = len(sources), sources[0].batch_shape
    why = "one per member, or per row and member"
    shapes = ((count,), (*batch, count))
    checks.require_shape_in(name, "weights", array, shapes, why)
    return array


def _least(sources: Sequence[Source], option: str) -> int | None:
    """The smallest size among the members, None if no member has one."""
    sizes = [getattr(source.options, option) for source in sources]
    return min([size for size in sizes if size is not None], default=None)


def _bare(source: Any) -> Any:
    """The member without class_where and options that the combination has itself."""
    options = dataclasses.replace(source.options, vocab_chunk=None, token_chunk=None)
    return source.replaced(
        modifiers=source.modifiers._replace(class_where=None),
        options=options,
        implementation=None,
    )
