"""The example of generated text: a short real run, the promises of its parts."""

import numpy as np
import pytest
from generated_text_study import errors, options as options_, reading, texts
from generated_text_study.reading import Reading
from smollm2 import checkpoints
from study.command_line import EXAMPLES

from softlib import scoring
from tests.examples.smoke import complete_run
from tests.host import jnp

SCRIPT = EXAMPLES / "detect_generated_text.py"
SMOKE = options_.Options(**options_.PRESETS["smoke"])
TINY = checkpoints.tiny()


def test_run_tests_texts_of_three_authors(tmp_path):
    out, metrics, printed = complete_run(SCRIPT, tmp_path / "smoke")
    found = metrics["findings"]
    assert set(found["authors"]) == {texts.OWN, texts.HUMAN, texts.SHIFTED}
    # A random model: everything is about as surprising as it expects.
    for author in found["authors"].values():
        assert abs(author["difference"]["value"]) < 0.1
    rows = found["errors"][texts.SHIFTED]
    assert {row["length"] for row in rows} == {*SMOKE.lengths}
    assert {row["test"] for row in rows} == {"level", "threshold", "ratio"}
    assert all(0 <= row["rate"]["value"] <= 1 for row in rows)
    assert "nats per token" in printed
    assert (out / "report.png").stat().st_size > 10_000


def test_texts_of_people_are_stretches_of_addresses():
    found = texts.windows(TINY, SMOKE)
    assert found.shape == (SMOKE.texts, SMOKE.prompt + max(SMOKE.lengths))
    assert len(np.unique(found, axis=0)) == SMOKE.texts


def test_pieces_are_tested_as_the_library_tests_texts():
    tokens = texts.windows(TINY, SMOKE)
    read = reading.read(TINY, tokens, SMOKE)
    logits = TINY.model(jnp.asarray(tokens))[:, SMOKE.prompt - 1 : -1]
    labels = jnp.asarray(tokens[:, SMOKE.prompt :])
    for length in SMOKE.lengths:
        pieces = (SMOKE.texts, -1, length)
        wanted = scoring.entropy_test(logits.reshape(*pieces), labels.reshape(pieces))
        found = errors.tested(read, length)
        np.testing.assert_allclose(found.z, wanted.z, rtol=2e-3, atol=2e-4)
        np.testing.assert_allclose(found.difference, wanted.difference, atol=2e-5)


def normal(*, shift, ratio, texts=400, length=64, seed=0):
    """Surprisals with standard deviation 2, above the entropy by a shift."""
    random = np.random.default_rng(seed)
    surprisal = 3 + shift + 2 * random.normal(size=(texts, length))
    same = np.ones((texts, length))
    return Reading(
        surprisal, 3 * same, 4 * same, ratio + random.normal(size=same.shape)
    )


def test_levels_hold_and_what_is_missed_falls_on_a_line():
    own, other = normal(shift=0, ratio=0.5), normal(shift=1, ratio=-0.5, seed=1)
    rows = errors.of_lengths(own, other, (4, 8, 16, 32), with_ratio=True)
    rate = lambda test, error: [
        row["rate"] for row in rows if (row["test"], row["error"]) == (test, error)
    ]
    for held in rate("level", "false"):
        assert held.low - 0.01 < 0.05 < held.high + 0.01
    for test, error in (
        ("level", "missed"),
        ("threshold", "false"),
        ("threshold", "missed"),
        ("ratio", "false"),
        ("ratio", "missed"),
    ):
        values = [found.value for found in rate(test, error)]
        assert values == sorted(values, reverse=True)
    drawn = {(line["test"], line["error"]): line for line in errors.lines(rows)}
    line = drawn["threshold", "missed"]
    assert line["slope"] < -0.02
    assert line["r_squared"] > 0.95


def test_without_the_other_model_there_is_no_ratio():
    own = normal(shift=0, ratio=0.0)
    rows = errors.of_lengths(own, own, (8,), with_ratio=False)
    assert {row["test"] for row in rows} == {"level", "threshold"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--texts", "10", "--batch", "4"], "--texts must be a multiple of --batch 4"),
        (["--lengths", "3,8"], "--lengths must divide the largest, got 3,8"),
    ],
)
def test_what_contradicts_itself_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        options_.parse(["--preset", "smoke", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
