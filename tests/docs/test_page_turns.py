"""A build that leaves pages out executes each of them in its turn."""

import itertools

import pytest

from docs import page_turns

ALL = page_turns.executable()


def test_pages_with_cells_are_found_and_others_are_not():
    assert "gallery.md" in ALL
    assert "concepts/logits.md" in ALL
    assert "reference/losses.md" not in ALL


@pytest.mark.parametrize("every", [1, 2, 3])
def test_builds_in_a_row_execute_every_page_once(every):
    executed = [{*ALL} - {*page_turns.left_out(every, k)} for k in range(every)]
    assert sorted(itertools.chain(*executed)) == ALL
    assert all(len(pages) > len(ALL) / every / 2 for pages in executed)


def test_a_build_of_all_pages_leaves_none_out():
    assert page_turns.left_out(1, 590) == []
