"""Choice of implementations: plans, pins, lowering platforms, explanations."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh

import softlib
from softlib import _dispatch, _ptxas
from softlib._dispatch import Implementation, Operation, absent
from softlib.logits._engine import operations
from tests.host import jnp

ROWS = 4


def _even(options, operands):
    rows = operands.shape[0]
    return None if rows % 2 == 0 else f"needs an even number of rows, got {rows}"


def _kernel(options, operands):
    # cbrt stands for the kernel: it is easy to find in lowered text, and it would be
    # wrong to run (the plain implementation doubles).
    return jnp.cbrt(operands)


DOUBLE = Operation(
    "double",
    (
        Implementation("pallas_tpu", _kernel, _even, "tpu"),
        absent("pallas_gpu", "cuda"),
        Implementation("xla", lambda options, operands: 2 * operands),
        Implementation("reference", lambda options, operands: operands + operands),
    ),
)


def double(x, implementation=None, operation=DOUBLE):
    return _dispatch.run(operation, implementation, None, x)


def test_a_program_lowered_for_tpu_contains_the_kernel_and_one_for_cpu_does_not():
    x = jnp.ones(ROWS)
    tpu = export.export(jax.jit(double), platforms=["tpu"])(x).mlir_module()
    assert "cbrt" in tpu
    assert "cbrt" not in jax.jit(double).lower(x).as_text()
    np.testing.assert_array_equal(jax.jit(double)(x), 2 * x)


def test_a_kernel_that_does_not_support_the_operands_is_in_no_program():
    text = export.export(jax.jit(double), platforms=["tpu"])(jnp.ones(3)).mlir_module()
    assert "cbrt" not in text


def test_derivatives_are_those_of_the_plain_implementation():
    x = jnp.arange(1.0, ROWS + 1)
    square = lambda x: (double(x) ** 2).sum()
    np.testing.assert_allclose(jax.jit(jax.grad(square))(x), 8 * x)
    hessian_vector = jax.jvp(jax.grad(square), (x,), (jnp.ones(ROWS),))[1]
    np.testing.assert_allclose(hessian_vector, 8)
    np.testing.assert_allclose(jax.vmap(double)(jnp.ones((3, ROWS))), 2)


def test_a_pinned_name_is_strict():
    with pytest.raises(NotImplementedError, match="not pallas_tpu: needs an even"):
        double(jnp.ones(3), "pallas")
    with pytest.raises(NotImplementedError, match="no cuda kernel"):
        double(jnp.ones(ROWS), "pallas_gpu")
    made = _dispatch.plan(DOUBLE, "pallas", None, jnp.ones(ROWS))
    assert dict(made.kernels).keys() == {"tpu"}
    assert made.fallback is None


def test_a_pinned_kernel_does_not_fall_back_on_another_platform():
    with pytest.raises(NotImplementedError, match="cpu"):
        jax.jit(lambda x: double(x, "pallas"))(jnp.ones(ROWS))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"pallas, xla, reference.* got 'triton'"):
        double(jnp.ones(ROWS), "triton")


def test_a_sequence_is_tried_in_its_order():
    of = lambda names, rows: _dispatch.plan(DOUBLE, names, None, jnp.ones(rows))
    name = lambda made: made.fallback and made.fallback.name
    assert name(of(("pallas", "reference"), 3)) == "reference"
    assert name(of(("reference", "xla"), 3)) == "reference"
    mixed = of(("pallas", "xla"), ROWS)
    assert [kernel.name for _, kernel in mixed.kernels] == ["pallas_tpu"]
    assert name(mixed) == "xla"


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_mesh_axis_that_the_compiler_partitions_refuses_kernels(kind):
    kind = getattr(jax.sharding.AxisType, kind)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        made = _dispatch.plan(DOUBLE, None, None, jnp.ones(ROWS))
    assert not made.kernels
    assert "'data' is not manual" in dict(made.reasons)["pallas_tpu"]


def test_inside_shard_map_kernels_are_allowed():
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("data",), axis_types=auto)
    seen = []

    def body(x):
        seen.append(_dispatch.plan(DOUBLE, None, None, x))
        return double(x)

    spec = jax.sharding.PartitionSpec("data")
    mapped = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec)
    jax.eval_shape(mapped, jnp.ones(2 * ROWS))
    assert dict(seen[0].kernels).keys() == {"tpu"}


def test_explain_says_what_runs_where_and_why_not_the_others(capsys):
    explanation = softlib.explain(double, jnp.ones(ROWS))
    assert (
        str(explanation)
        == repr(explanation)
        == (
            "double\n  tpu: pallas_tpu\n  elsewhere: xla\n"
            "  not pallas_gpu: this version has no cuda kernel for it"
        )
    )
    assert not capsys.readouterr().out
    (found,) = explanation.operations
    assert str(found) == repr(found) == str(explanation)
    assert found.operation == "double"
    assert found.runs == {"tpu": "pallas_tpu", "elsewhere": "xla"}
    assert found.refused == {"pallas_gpu": "this version has no cuda kernel for it"}
    assert not found.notes
    odd = str(softlib.explain(double, jax.ShapeDtypeStruct((3,), jnp.float32)))
    assert "everywhere: xla" in odd
    assert "not pallas_tpu: needs an even number of rows, got 3" in odd


def test_explain_hears_warm_caches_loops_and_derivatives():
    x = jnp.ones(ROWS)

    @jax.jit
    def step(x):
        body = lambda carry, _: (double(carry), None)
        return jax.lax.scan(body, x, None, length=2)[0].sum()

    gradient = jax.jit(jax.grad(step))
    gradient(x)
    assert str(softlib.explain(gradient, x)).startswith("double\n  tpu: pallas_tpu")


def test_explain_passes_on_what_is_not_an_array():
    def call(x, *, implementation, options):
        assert options == {"name": "text", "flag": None}
        return double(x, implementation)

    text = str(
        softlib.explain(
            call,
            jnp.ones(ROWS),
            implementation="reference",
            options={"name": "text", "flag": None},
        )
    )
    assert text.startswith("double\n  everywhere: reference")


def test_explain_of_a_function_without_operations():
    assert (
        str(softlib.explain(jnp.sin, jnp.ones(2))) == "no operation of softlib was met"
    )


def test_explain_names_the_backward_pass_too():
    loss = softlib.losses.linear_softmax_cross_entropy
    total = lambda h, w, y: loss(h, w, y).sum()
    struct = jax.ShapeDtypeStruct
    arguments = (
        struct((8, 16), jnp.bfloat16),
        struct((50257, 16), jnp.bfloat16),
        struct((8,), jnp.int32),
    )
    explanation = softlib.explain(jax.grad(total), *arguments)
    names = [found.operation for found in explanation.operations]
    assert names == ["linear_row_statistics", "linear_row_statistics_gradient"]


# ------------------------------------------------------------- explain, of one device
HEAD = (
    jax.ShapeDtypeStruct((2048, 512), jnp.bfloat16),
    jax.ShapeDtypeStruct((50_264, 512), jnp.bfloat16),
    jax.ShapeDtypeStruct((2048,), jnp.int32),
)


def _head_loss(hidden, weight, labels, implementation=None):
    logits = softlib.LinearLogits(hidden, weight, implementation=implementation)
    return softlib.losses.softmax_cross_entropy(logits, labels).sum()


@pytest.mark.parametrize(
    ("device", "found"),
    [
        ("cpu", "xla"),
        ("a100", "xla"),
        ("h100", "pallas_gpu"),
        ("b200", "xla"),
        *((tpu, "pallas_tpu") for tpu in ("v4", "v5e", "v5p", "v6e", "tpu7x")),
    ],
)
def test_explain_answers_for_a_device_that_is_not_here(device, found):
    explanation = softlib.explain(jax.grad(_head_loss), *HEAD, device=device)
    assert [operation.runs for operation in explanation.operations] == [
        {device: found}
    ] * 2
    for operation in explanation.operations:
        assert set(operation.notes) <= {found}
        is_gpu = device in ("a100", "h100", "b200")
        refused = {"pallas_gpu"} if is_gpu and found == "xla" else set()
        assert set(operation.refused) == refused


def test_explain_of_a_device_has_the_tiles_of_that_device():
    of = lambda device: softlib.explain(_head_loss, *HEAD, device=device).operations[0]
    assert len({of(device).notes["pallas_tpu"] for device in ("v4", "v5e")}) == 2


def test_explain_takes_a_device_as_jax_describes_it():
    hopper = AbstractDevice("NVIDIA GH200 with H200", None, "gpu")
    turing = AbstractDevice("Tesla T4", None, "cuda")
    for device, found in ((hopper, "pallas_gpu"), (turing, "xla")):
        explanation = softlib.explain(_head_loss, *HEAD, device=device)
        (operation,) = explanation.operations
        assert operation.runs == {device.device_kind: found}


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_explain_of_a_device_overrules_that_of_a_mesh(kind):
    kind = getattr(jax.sharding.AxisType, kind)
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(kind,))
    spec = jax.sharding.PartitionSpec("rows")
    soft = jax.shard_map(
        softlib.softmax.softmax, mesh=mesh, in_specs=spec, out_specs=spec
    )
    x = jax.ShapeDtypeStruct(
        (4096, 1024), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, spec)
    )
    for device, found in (("h100", "pallas_gpu"), ("a100", "xla")):
        with jax.set_mesh(mesh):
            inside = softlib.explain(soft, x, device=device)
        (outside,) = softlib.explain(soft, x, device=device).operations
        assert inside.operations[0].runs == outside.runs == {device: found}


def test_explain_of_a_device_asks_nothing_of_this_machine(monkeypatch):
    monkeypatch.setattr(_ptxas, "why_not", lambda: "it is faulty")
    (operation,) = softlib.explain(_head_loss, *HEAD, device="h100").operations
    assert operation.runs == {"h100": "pallas_gpu"}
    x = jax.ShapeDtypeStruct((1, 256, 4, 64), jnp.bfloat16)
    attend = softlib.attention.dot_product_attention
    (operation,) = softlib.explain(attend, x, x, x, device="a100").operations
    assert operation.runs == {"a100": "cudnn"}


def test_a_kernel_that_comes_later_is_not_refused():
    x = jax.ShapeDtypeStruct((1, 256, 4, 64), jnp.bfloat16)
    capped = functools.partial(softlib.attention.dot_product_attention, softcap=9.0)
    (operation,) = softlib.explain(capped, x, x, x, device="h100").operations
    assert (operation.runs, operation.refused) == ({"h100": "pallas_gpu"}, {})


def test_explain_names_the_device_for_which_nothing_requested_runs():
    pinned = functools.partial(_head_loss, implementation="pallas_tpu")
    softlib.explain(pinned, *HEAD, device="v5e")
    message = "linear_row_statistics: no requested .* for h100, only kernels for tpu"
    with pytest.raises(NotImplementedError, match=message):
        softlib.explain(pinned, *HEAD, device="h100")


def test_an_unknown_device_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"one of cpu, a100, .*tpu7x.* got 'H100'"):
        softlib.explain(_head_loss, *HEAD, device="H100")


# ------------------------------------------------ the seam of the row-statistics engine
def _marked(implementation: Implementation) -> Implementation:
    """A kernel for the TPU: what XLA does, beside an operation to find in the text."""

    def call(options, operands):
        found = implementation.call(options, operands)
        mark = lambda leaf: (
            leaf + 0 * jnp.cbrt(leaf) if leaf.dtype == jnp.float32 else leaf
        )
        return jax.tree.map(mark, found)

    def why_not(options, operands):
        return None if options.softcap is None else "supports no softcap"

    return dataclasses.replace(
        implementation, name="pallas_tpu", call=call, why_not=why_not, platform="tpu"
    )


@pytest.fixture
def kernels(monkeypatch):
    """Puts kernels into the operations of the engine."""
    for name in ("LINEAR", "LINEAR_GRADIENT"):
        operation = getattr(operations, name)
        fake = _marked(operation.plain)
        others = tuple(i for i in operation.implementations if i.name != fake.name)
        replaced = dataclasses.replace(operation, implementations=(fake, *others))
        monkeypatch.setattr(operations, name, replaced)


def _loss(implementation=None, softcap=None):
    def total(h, w, y):
        return softlib.losses.linear_softmax_cross_entropy(
            h, w, y, softcap=softcap, implementation=implementation
        ).sum()

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))


def _arguments():
    key = jax.random.key(0)
    h, w = jax.random.normal(key, (6, 5)), jax.random.normal(key, (9, 5))
    return h, w, jnp.arange(6)


@pytest.mark.usefixtures("kernels")
def test_a_loss_traced_on_a_cpu_carries_its_kernels_to_the_tpu():
    h, w, y = _arguments()
    forward_and_backward = export.export(_loss(), platforms=["tpu"])(h, w, y)
    assert forward_and_backward.mlir_module().count("cbrt") >= 2
    assert "cbrt" not in _loss().lower(h, w, y).as_text()
    capped = export.export(_loss(softcap=5.0), platforms=["tpu"])(h, w, y)
    assert "cbrt" not in capped.mlir_module()


@pytest.mark.usefixtures("kernels")
def test_values_and_second_order_are_untouched_by_kernels_for_other_platforms():
    arguments = _arguments()
    expected = _loss("xla")(*arguments)
    for actual, wanted in zip(
        jax.tree.leaves(_loss()(*arguments)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(actual, wanted)
    h, w, y = arguments
    product = lambda name: jax.jvp(
        lambda h: _loss(name)(h, w, y)[1][0], (h,), (jnp.ones_like(h),)
    )[1]
    np.testing.assert_allclose(product(None), product("reference"), atol=1e-5)


@pytest.mark.usefixtures("kernels")
def test_a_pinned_kernel_names_its_limit():
    with pytest.raises(NotImplementedError, match="pallas_tpu: supports no softcap"):
        _loss("pallas", softcap=5.0)(*_arguments())


def test_a_kernel_is_traced_for_the_device_for_which_it_was_planned():
    """Tiles depend on the device, and a program may be lowered outside of its mesh."""
    seen = []

    def call(options, operands):
        seen.append(jax.sharding.get_abstract_mesh().abstract_device)
        return operands

    kernel = Implementation("pallas_tpu", call, platform="tpu")
    operation = Operation("device", (kernel, DOUBLE.plain))
    device = AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        traced = jax.jit(functools.partial(double, operation=operation)).trace(
            jnp.ones(ROWS)
        )
        assert seen == []  # nor is it traced before
    traced.lower(lowering_platforms=("tpu",))
    assert seen == [device]


def test_a_kernel_is_traced_only_where_it_is_lowered_for():
    seen = []

    def call(options, operands):
        seen.append("traced")
        return operands

    kernel = Implementation("pallas_tpu", call, platform="tpu")
    operation = Operation("counted", (kernel, DOUBLE.plain))
    function = lambda x: double(x, operation=operation)
    jax.jit(jax.grad(lambda x: function(x).sum()))(jnp.ones(ROWS))
    function(jnp.ones(ROWS))
    assert seen == []


def _counting_copies(options, operands, copies):
    # tan stands for larger steps: it is easy to find, and it would be wrong to run.
    return copies * jnp.tan(operands)


SIZED = Operation(
    "sized",
    (
        Implementation("pallas_tpu", _kernel, _even, "tpu"),
        dataclasses.replace(DOUBLE.plain, accelerated=_counting_copies),
    ),
)


def sized(x, implementation=None):
    return double(x, implementation, SIZED)


@pytest.mark.parametrize(
    ("platform", "rows", "found"),
    [("cpu", 3, "multiply"), ("cuda", 4, "tan"), ("tpu", 3, "tan"), ("tpu", 4, "cbrt")],
)
def test_plain_jax_takes_the_steps_of_the_platform_that_is_lowered(
    platform, rows, found
):
    lowered = jax.jit(sized).trace(jnp.ones(rows)).lower(lowering_platforms=(platform,))
    text = lowered.as_text()
    assert f".{found} " in text
    assert all(f".{name} " not in text for name in {"tan", "cbrt"} - {found})


def test_steps_of_a_platform_know_how_many_copies_share_its_memory():
    mapped = jax.jit(jax.vmap(jax.vmap(sized)))
    lowered = mapped.trace(jnp.ones((5, 7, 3))).lower(lowering_platforms=("cuda",))
    assert "dense<3.500000e+01>" in lowered.as_text()


def test_one_export_serves_several_platforms():
    platforms = ["cpu", "tpu", "cuda"]
    exported = export.export(jax.jit(double), platforms=platforms)(jnp.ones(ROWS))
    assert "cbrt" in exported.mlir_module()
    np.testing.assert_allclose(exported.call(jnp.arange(4.0)), 2 * jnp.arange(4.0))


def test_an_eager_call_compiles_once():
    counted = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: counted.append(event) if "compile" in event else None
    )
    x = jnp.ones(ROWS) * 3
    function = jax.grad(lambda x: double(x).sum())
    for _ in range(2):
        counted.clear()
        function(x)
    assert counted == []


def test_without_jit_an_operation_runs_on_values():
    seen = []

    def call(options, operands):
        seen.append(isinstance(operands, jax.core.Tracer))
        return 2 * operands

    kernel = Implementation("pallas_tpu", _kernel, platform="tpu")
    operation = Operation("visible", (kernel, Implementation("xla", call)))
    with jax.disable_jit():
        np.testing.assert_array_equal(double(jnp.ones(ROWS), operation=operation), 2)
    assert seen == [False]
