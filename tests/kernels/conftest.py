"""Interpreters are slow: what only `make slow` runs.

The default suite runs every kernel with every dtype, with ragged edges and with empty
rows. Most of the other options are for `make slow`.
"""

import faulthandler

import pytest

# After which a barrier of a GPU kernel, at which nobody arrives, has hung.
SECONDS = 300

SLOW = {
    "test_gpu_attention.py": (
        "test_output_and_gradients[lengths, extreme scores]",
        "test_output_and_gradients[log softplus, softcap]",
        "test_lowered_inside_shard_map[False]",
    ),
    "test_gpu_row_statistics_dispatch.py": ("test_in_shard_map[bfloat16-False]",),
    "test_gpu_trilinear.py": (
        "test_output_and_gradients[ragged]",
        "test_output_and_gradients[joint, features]",
        "test_rows_that_attend_to_nothing_at_all",
        "test_lowered_inside_shard_map",
    ),
    "test_tpu_attention.py": (
        "test_output_and_gradients[causal]",
        "test_output_and_gradients[radial]",
        "test_output_and_gradients[lengths]",
        "test_output_and_gradients[extreme scores]",
        "test_lowered_inside_shard_map_with_arrays_over_pairs[False]",
    ),
    "test_tpu_decode.py": (
        "test_matches_the_oracle[bfloat16, running]",
        "test_matches_the_oracle[sinks]",
        "test_matches_the_oracle[no lengths]",
        "test_matches_the_oracle[three heads]",
        "test_matches_the_oracle[unified]",
    ),
    "test_tpu_trilinear.py": (
        "test_simulated[bfloat16-simulated]",
        "test_interpreted[plain-three heads]",
        "test_interpreted[plain-empty rows]",
        "test_interpreted[plain-joint]",
    ),
}


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.name in SLOW.get(item.path.name, ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def no_test_hangs(request: pytest.FixtureRequest):
    watched = request.path.name.startswith("test_gpu_")
    if watched:
        faulthandler.dump_traceback_later(SECONDS, exit=True)
    yield
    if watched:
        faulthandler.cancel_dump_traceback_later()
