"""How much memory distillation needs while it runs, read from compiled programs.

Only temporaries count: neither hidden states and tables nor gradients. Nothing is run.
"""

import jax
import jax.numpy as jnp

from softlib import LinearLogits, losses

from .options import Options


def streamed(z: LinearLogits, teacher: LinearLogits) -> jax.Array:
    return losses.softmax_kl_divergence(z, teacher).mean()


def stored(z: LinearLogits, teacher: LinearLogits) -> jax.Array:
    formed = (z.materialize(), teacher.materialize())
    return losses.softmax_kl_divergence(*formed).mean()


def measure(options: Options) -> dict[str, int | None]:
    """Temporary bytes of a divergence and the student's gradients."""
    return {
        "two heads, streamed": _temporary(streamed, options),
        "both logits stored": _temporary(stored, options),
    }


def _temporary(loss, options: Options) -> int | None:
    def head(width: int) -> LinearLogits:
        shapes = ((options.memory_rows, width), (options.tokens, width))
        arrays = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        return jax.eval_shape(LinearLogits, *arrays)

    student, teacher = (
        head(options.text_student_width),
        head(options.text_teacher_width),
    )
    # The gradient of the student's logits is that of its hidden states and its table.
    program = jax.jit(jax.value_and_grad(loss)).lower(student, teacher).compile()
    found = program.memory_analysis()
    return None if found is None else found.temp_size_in_bytes
