"""The functions and the peers of the table compute the same."""

import jax
import numpy as np

from benchmarks import sequences


def test_peers_compute_the_same():
    for line in sequences.lines(quick=True):
        if line.peer == "no mask":
            continue
        given = sequences.arrays(line)
        own, other = (jax.jit(f)(*given) for f in (line.own, line.other))
        np.testing.assert_allclose(own, other, atol=2e-4, err_msg=line.name)


def test_a_row_of_the_table(monkeypatch):
    line = sequences.lines(quick=True)[2]
    monkeypatch.setattr("benchmarks.measure.PAUSE", 0)
    name, peer, forward, backward = sequences.measured(line, rounds=3)
    assert (name, peer) == (line.name, "jax.nn")
    assert all(float(cell.split()[0]) > 0 for cell in (forward, backward))
