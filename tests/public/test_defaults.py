"""Defaults of public functions change where a reader sees it, and nowhere else."""

from tests import defaults


def test_defaults_are_those_of_the_table():
    """After a change that is meant: `python -m tests.defaults`."""
    assert [*defaults.lines()] == defaults.TABLE.read_text().splitlines()
