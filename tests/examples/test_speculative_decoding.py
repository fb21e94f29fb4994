"""The example of speculative decoding: a short real run, the promises of its parts."""

import numpy as np
import pytest
from smollm2 import answers, checkpoints
from speculative_study import generation, law, options as options_, replay, texts
from study.command_line import EXAMPLES

from softlib.decoding import NGramDraft, PromptLookup
from tests.examples.smoke import complete_run
from tests.host import jnp

SCRIPT = EXAMPLES / "speculative_decoding.py"
SMOKE = options_.Options(**options_.PRESETS["smoke"])
TINY = checkpoints.tiny()


def test_run_counts_and_times(tmp_path):
    out, metrics, printed = complete_run(SCRIPT, tmp_path / "smoke")
    found = metrics["findings"]
    assert {*found["calls"]} == {*found["seconds"]}
    assert {*found["calls"]} == {texts.COPY, texts.FREE, texts.CHAT}
    for kind, rows in found["calls"].items():
        for draft, row in rows.items():
            assert row["tokens_per_call"]["value"] >= 1
            assert 0 <= row["accepted"]["value"] <= 1
            # Whatever the draft, the text is that of plain decoding.
            assert found["seconds"][kind][draft]["same"] == 1
    assert [share["count"] for share in found["law"]["2"]["shares"]] == [2] * 3
    assert "tokens per call" in printed
    assert (out / "report.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "draft",
    [
        PromptLookup(draft_length=3, shortest=1),
        NGramDraft.fit(np.arange(60) % 7, draft_length=2, shortest=0),
    ],
)
def test_replayed_calls_are_those_of_the_model(draft):
    prompts = [[5, 6, 7, 5, 6], [1, 2, 3]]
    decoders = generation.decoders(TINY, answer=12, room=32)
    written, wanted = [], []
    for prompt in prompts:
        tokens, lengths = answers.padded([prompt], vocabulary=257, multiple=8)
        read = decoders.read(jnp.asarray(tokens), jnp.asarray(lengths))
        written.append(np.asarray(decoders.plain(read).tokens)[0])
        drafted = decoders.drafted(read, draft)
        np.testing.assert_array_equal(drafted.generated.tokens[0], written[-1])
        wanted.append((drafted.num_steps, drafted.num_drafted, drafted.num_accepted))
    calls = replay.calls(prompts, np.stack(written), draft, 257)
    np.testing.assert_array_equal(
        np.stack(calls, 1), [[int(np.squeeze(n)) for n in row] for row in wanted]
    )


def test_a_draft_of_a_text_that_repeats_is_always_right():
    text = np.arange(300) % 7
    options = options_.Options(counted=(5, 20, 300), orders=(2, 3), seeds=2)
    found = law.measured([text], [list(text[:40])], 10, options)
    shares = [share.value for share in found["2"]["shares"]]
    assert shares[0] < 1
    assert shares[1:] == [1, 1]
    assert found["2"]["slope"].value > 0


def test_addresses_are_parted_and_complete():
    counted = [np.array([1, 2]), np.array([3]), np.array([4, 5, 6])]
    found = texts.shuffled(counted, 1)
    assert (found < 0).sum() == 3
    assert sorted(found[found > 0]) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--timed", "3"], "--timed must be at most 2"),
        (["--counted", "10,100"], "--counted must have at least 3 numbers"),
    ],
)
def test_what_contradicts_itself_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        options_.parse(["--preset", "smoke", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
