"""How much memory distillation needs while it runs, read from compiled programs.

Only temporaries count: neither hidden states and tables nor gradients. Nothing is run.
"""

import jax
import jax.numpy as jnp

from softlib import losses

from .options import Options


def streamed(hidden, table, *teacher) -> jax.Array:
    return losses.linear_kl_divergence(hidden, table, *teacher).mean()


def stored(hidden, table, teacher_hidden, teacher_table) -> jax.Array:
    z = losses.linear_logits(hidden, table)
    teacher = losses.linear_logits(teacher_hidden, teacher_table)
    return losses.softmax_kl_divergence(z, teacher).mean()


def measure(options: Options) -> dict[str, int | None]:
    """Temporary bytes of a divergence and the student's gradients."""
    return {
        "two heads, streamed": _temporary(streamed, options),
        "both logits stored": _temporary(stored, options),
    }


def _temporary(loss, options: Options) -> int | None:
    def head(width: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        shapes = ((options.memory_rows, width), (options.tokens, width))
        return tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)

    operands = head(options.text_student_width) + head(options.text_teacher_width)
    program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*operands).compile()
    found = program.memory_analysis()
    return None if found is None else found.temp_size_in_bytes
