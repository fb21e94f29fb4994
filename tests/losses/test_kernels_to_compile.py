"""Counts the kernels that the CPU's compiler makes of a loss and its gradients.

Each distinct one takes it about as long whatever it does, so they are the time of a
first call. They are read off the compiled program; nothing is run.
"""

import re

import jax
import pytest

from softlib.losses import linear_softmax_cross_entropy, softmax_cross_entropy
from tests.host import jnp

struct = jax.ShapeDtypeStruct


def distinct_kernels(text: str) -> set[str]:
    """The computations of the loops of a compiled program, without their names."""
    text = re.sub(r", metadata=\{[^}]*\}", "", text)
    bodies = dict(re.findall(r"^%([\w.-]+) \([^\n]*\{\n(.*?)^\}", text, re.M | re.S))

    def anonymous(body: str) -> str:
        names: dict[str, str] = {}

        def numbered(match: re.Match[str]) -> str:
            name = match[1]
            if name in bodies:  # what a reduction applies
                return anonymous(bodies[name])
            return names.setdefault(name, f"%{len(names)}")

        return re.sub(r"%([\w.-]+)", numbered, body)

    called = re.findall(r" fusion\([^\n]*kind=kLoop, calls=%([\w.-]+)", text)
    return {anonymous(bodies[name]) for name in called}


def of_logits(logits, weight, labels):
    return softmax_cross_entropy(logits @ weight.T, labels).mean()


def of_head(**options):
    def loss(hidden, weight, labels):
        return linear_softmax_cross_entropy(hidden, weight, labels, **options).mean()

    return loss


@pytest.mark.parametrize(
    ("loss", "vocabulary", "most"),
    [
        pytest.param(of_logits, 1000, 13, id="logits"),
        pytest.param(of_head(), 1000, 7, id="one tile"),
        pytest.param(of_head(vocab_chunk=1024), 4096, 21, id="loop"),
        pytest.param(of_head(vocab_chunk=1024), 5000, 25, id="loop and rest"),
    ],
)
def test_few_kernels_are_compiled(loss, vocabulary, most):
    operands = (
        struct((128, 64), jnp.float32),
        struct((vocabulary, 64), jnp.float32),
        struct((128,), jnp.int32),
    )
    program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*operands).compile()
    found = distinct_kernels(program.as_text() or "")
    assert 3 <= len(found) <= most


def test_equal_kernels_count_once():
    kernel = "%{0} (p: f32[4]) -> f32[4] {{\n  %p.{0} = f32[4] parameter(0)\n}}\n"
    call = " %x = f32[4] fusion(%y), kind=kLoop, calls=%{0}\n"
    text = "".join(map(kernel.format, "abc")) + "".join(map(call.format, "ab"))
    assert len(distinct_kernels(text)) == 1
    other = text.replace("%p.b = f32[4]", "%p.b = f32[5]")
    assert len(distinct_kernels(other)) == 2
