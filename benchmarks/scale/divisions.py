"""Ways to divide a training step over devices, as programs of `jax.shard_map`.

Devices lie on a mesh of two axes: `hosts`, and `host`, whose devices have fast links.
Parameters and the states of Adam are float32. A device casts its part to bfloat16
before it is gathered, so gradients are summed over devices in bfloat16, too.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array

from softlib import LinearLogits, attention, losses, masks

from .model import Model, Weights, body, is_of_layers, rms_norm

AXES = ("hosts", "host")
HOSTS, HOST = AXES
DTYPE = jnp.bfloat16
HEADS = ("softlib", "stored")


@dataclasses.dataclass(frozen=True)
class Division:
    """Where parameters, tokens and classes lie.

    Attributes:
        name: Of a table's row.
        sharded: Whether parameters are divided over all devices and gathered layer by
            layer (FSDP), or lie on each.
        sequence: How attention crosses the devices of a host, which share sequences;
            None gives each device whole sequences.
        vocabulary: Whether each device of a host has the head of its own classes, for
            the tokens of all of these devices.
    """

    name: str
    sharded: bool = True
    sequence: Literal["ring", "all_to_all"] | None = None
    vocabulary: bool = False

    def sequences(self, mesh: Mesh) -> int:
        """Sequences of a step: one on each device, or on each host."""
        return mesh.shape[HOSTS] if self.sequence else mesh.size

    def spec_of_tokens(self) -> P:
        return P(HOSTS, HOST) if self.sequence else P(AXES)

    def spec(self, name: str) -> P:
        """Of a parameter. Vectors are small, and lie on each device."""
        if not self.sharded or "norm" in name:
            return P()
        if is_of_layers(name):
            return P(None, AXES)
        return P(HOST, HOSTS) if self.vocabulary else P(None, AXES)


DIVISIONS = (
    Division("data parallel", sharded=False),
    Division("fully sharded"),
    Division("vocabulary parallel", vocabulary=True),
    Division("sequence, ring", sequence="ring"),
    Division("sequence, all to all", sequence="all_to_all"),
    Division(
        "sequence, all to all, and vocabulary", sequence="all_to_all", vocabulary=True
    ),
)


def lower(
    model: Model, division: Division, head: str, mesh: Mesh
) -> jax.stages.Lowered:
    """A training step with Adam, lowered for the devices of the mesh."""
    adam = optax.adam(1e-4)
    specs = {name: division.spec(name) for name in model.shapes}
    parameters = {
        name: jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(mesh, specs[name])
        )
        for name, shape in model.shapes.items()
    }
    # The moments are divided as the parameters are; the counter is not.
    moments, rest = jax.eval_shape(adam.init, parameters)
    state_specs = (moments._replace(count=P(), mu=specs, nu=specs), rest)
    state = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
        ),
        (moments, rest),
        state_specs,
    )
    of_tokens = division.spec_of_tokens()
    tokens = jax.ShapeDtypeStruct(
        (division.sequences(mesh), model.length),
        jnp.int32,
        sharding=NamedSharding(mesh, of_tokens),
    )

    def step(parameters, state, tokens, labels):
        loss = lambda p: _loss(model, division, head, p, tokens, labels)
        value, gradients = jax.value_and_grad(loss)(parameters)
        updates, state = adam.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, value

    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(specs, state_specs, of_tokens, of_tokens),
        out_specs=(specs, state_specs, P()),
    )
    jitted = jax.jit(mapped, donate_argnums=(0, 1))
    return jitted.trace(parameters, state, tokens, tokens).lower()


def _loss(
    model: Model,
    division: Division,
    head: str,
    parameters: Weights,
    tokens: Array,
    labels: Array,
) -> Array:
    """Mean cross-entropy over the tokens of all devices."""
    table = _Table.of(division, parameters["embedding"])
    first = lax.axis_index(HOST) * tokens.shape[1] if division.sequence else 0

    def whole(weights: Weights) -> Weights:
        return {n: _gathered(x, division.spec(n)[1:]) for n, x in weights.items()}

    def attend(query: Array, key: Array, value: Array) -> Array:
        if division.sequence is None:
            return attention.dot_product_attention(
                query, key, value, mask=masks.Causal()
            )
        found: Any = attention.sequence_parallel_attention(
            query,
            key,
            value,
            axis_name=HOST,
            method=division.sequence,
            mask=masks.Causal(),
        )
        return found

    hidden = body(
        model,
        {n: x for n, x in parameters.items() if is_of_layers(n)},
        table.look_up(tokens),
        first + jnp.arange(tokens.shape[1]),
        whole=whole,
        attend=attend,
    )
    hidden = rms_norm(hidden, parameters["norm"])
    per_token = table.cross_entropy(head, hidden, labels)
    mean = per_token.mean()
    # With a divided vocabulary the devices of a host are known to have the same.
    return lax.pmean(mean, tuple(sorted(jax.typeof(mean).manual_axis_type.varying)))


def _gathered(x: Array, spec: Any) -> Array:
    """The whole array in bfloat16, from a part of it that `spec` divides."""
    x = x.astype(DTYPE)
    for axis, names in enumerate(spec):
        if names is not None:
            x = lax.all_gather(x, names, axis=axis, tiled=True)
    return x


@dataclasses.dataclass(frozen=True)
class _Table:
    """The embedding, which is the head as well.

    Attributes:
        division: Where it lies.
        weight: In bfloat16 what the head takes: all classes, or those of this device.
        columns: In float32 some features of all classes, those of this device among
            the devices of `axes`; all features where there are none.
        axes: Axes of the mesh that divide `columns`.
    """

    division: Division
    weight: Array
    columns: Array
    axes: Any

    @classmethod
    def of(cls, division: Division, own: Array) -> "_Table":
        weight = _gathered(own, (None, *division.spec("embedding")[1:]))
        if not division.sharded:
            # One sum over devices for both uses of the table.
            weight = lax.pcast(weight, AXES, to="varying")
            return cls(division, weight, weight.astype(jnp.float32), ())
        if not division.vocabulary:
            return cls(division, weight, own, AXES)
        columns = lax.all_to_all(weight, HOST, 1, 0, tiled=True)
        return cls(division, weight, columns.astype(jnp.float32), HOST)

    def look_up(self, tokens: Array) -> Array:
        """Rows of the tokens, (B, T, D), in bfloat16.

        A device looks up its features for the tokens of all others: these are fewer
        numbers to exchange than the table has.
        """
        if not self.axes:
            return self.columns[tokens].astype(DTYPE)
        every = lax.all_gather(tokens, self.axes, axis=0, tiled=True)
        rows = self.columns[every].astype(DTYPE)
        return lax.all_to_all(rows, self.axes, 0, 2, tiled=True)

    def cross_entropy(self, head: str, hidden: Array, labels: Array) -> Array:
        """Loss of each token; with a divided vocabulary of all tokens of the host."""
        axis = None
        if self.division.vocabulary:
            axis = HOST
            hidden, labels = (
                lax.all_gather(x, axis, axis=0, tiled=True) for x in (hidden, labels)
            )
        if head == "stored":
            return _stored_cross_entropy(hidden, self.weight, labels, axis)
        logits = LinearLogits(hidden, self.weight, axis_name=axis)
        return losses.softmax_cross_entropy(logits, labels)


def _stored_cross_entropy(
    hidden: Array, weight: Array, labels: Array, axis: str | None
) -> Array:
    """The loss of logits that are stored, as programs without softlib have it."""
    logits = (hidden @ weight.T).astype(jnp.float32)
    if axis is None:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    top = lax.pmax(lax.stop_gradient(logits.max(-1)), axis)
    total = lax.psum(jnp.exp(logits - top[..., None]).sum(-1), axis)
    classes = weight.shape[0]
    local = labels - lax.axis_index(axis) * classes
    here = (local >= 0) & (local < classes)
    found = jnp.take_along_axis(logits, jnp.where(here, local, 0)[..., None], axis=-1)
    label_logits = lax.psum(jnp.where(here, found[..., 0], 0), axis)
    return top + jnp.log(total) - label_logits
