"""The picture holds what the mask holds; matplotlib is imported only to draw."""

import builtins
import re
import sys

import jax
import numpy as np
import pytest

from softlib import masks
from tests.host import jnp

pytest.importorskip("matplotlib").use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def drawn(ax) -> np.ndarray:
    ax.figure.canvas.draw()
    (image,) = ax.images
    return np.asarray(image.get_array())


def test_tokens():
    mask = masks.Causal() & masks.Dilated(2)
    ax = masks.plot(mask, 5, 7)
    np.testing.assert_array_equal(drawn(ax), 3 * mask.materialize(5, 7))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key", "query")
    assert ax.get_xlim() == (0, 7)
    assert ax.get_ylim() == (5, 0)  # queries downwards
    assert len(ax.lines) == 0
    (image,) = ax.images
    assert image.get_extent() == [0, 7, 5, 0]
    assert image.get_clim() == (0, 3)
    assert image.get_interpolation() == "nearest"
    assert image.get_interpolation_stage() == "rgba"
    assert len({*map(tuple, shades(image))}) == 4


def shades(image) -> np.ndarray:
    """The colours of the numbers from 0, which is white; the last is the darkest."""
    least, most = map(int, image.get_clim())
    found = image.to_rgba(np.arange(least, most + 1))
    np.testing.assert_array_equal(found[0], 1)
    assert found[-1].sum() == found.sum(1).min()
    return found


def test_a_figure_of_its_own_has_a_title_and_a_legend_beside_it():
    mask = masks.Causal() & masks.Window(2, 0)
    ax = masks.plot(mask, 8, block=4)
    assert ax.get_title() == repr(mask)
    legend = ax.get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["does not attend", "visited for nothing", "attends"]
    ax.figure.canvas.draw()
    assert legend.get_window_extent().x0 >= ax.get_window_extent().x1
    given = plt.figure().add_subplot()
    masks.plot(mask, 8, ax=given)
    assert (given.get_title(), given.get_legend()) == ("", None)


def test_a_notebook_shows_what_the_mask_holds():
    mask = masks.Causal() & masks.Window(40, 0)
    shown = mask._repr_html_()
    assert shown is not None
    assert "Causal() &amp; Window(40, 0)" in shown
    assert 'viewBox="0 0 128 128"' in shown  # at 32 it is merely causal
    found = np.zeros((128, 128), bool)
    for start, row, run in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", shown):
        found[int(row), int(start) : int(start) + int(run)] = True
    np.testing.assert_array_equal(found, mask.materialize(128))
    packed = masks.Segments(jnp.array([[0, 0, 1], [0, 1, 1]]))._repr_html_()
    assert packed is not None
    assert packed.count("z") >= 3
    assert 'viewBox="0 0 3 3"' in packed
    assert "M0 0h2v1h-2zM0 1h2v1h-2zM2 2h1v1h-1z" in packed  # the first of the batch
    for plain in (masks.Causal(), masks.All(), ~masks.All()):
        assert 'viewBox="0 0 32 32"' in str(plain._repr_html_())


def test_a_traced_mask_has_no_picture():
    def function(ids):
        assert masks.Segments(ids)._repr_html_() is None
        return ids

    jax.jit(function)(jnp.zeros(3, int))


def test_blocks_tell_what_a_kernel_does():
    mask = masks.Radial(6) | masks.GlobalTokens(20, 21)
    ax = masks.plot(mask, 25, 30, block=(4, 5))
    kinds = masks.block_map(mask, (25, 30), (4, 5))
    image = drawn(ax)
    for query in range(25):
        for key in range(30):
            kind = kinds[query // 4, key // 5]
            attends = bool(mask(query, key))
            expected = {0: (0, None), 1: (1, 3), 2: (None, 2)}[int(kind)][attends]
            assert image[query, key] == expected
    assert len(ax.lines) == 6 + 5


def test_one_block_size_serves_both_axes_and_lines_may_be_at_frames():
    mask = masks.Radial(4)
    ax = masks.plot(mask, 12, block=3, lines=4)
    np.testing.assert_array_equal(drawn(ax), drawn(masks.plot(mask, 12, block=(3, 3))))
    heights = [np.asarray(line.get_ydata())[0] for line in ax.lines[:2]]
    places = [np.asarray(line.get_xdata())[0] for line in ax.lines[2:]]
    assert heights == places == [4, 8]
    assert {line.get_color() for line in ax.lines} == {"#b8b8b8"}
    assert {line.get_linewidth() for line in ax.lines} == {0.4}
    for length, count in ((64, 64 - 1), (65, 0)):
        for lengths in ((length, 2), (2, length)):
            found = masks.plot(mask, *lengths, lines=1).lines
            assert len(found) == (count + 1 if count else 0)


def test_blocks_alone_for_long_sequences():
    mask = masks.Radial(3600, rule="pow2", min_window=128)
    length = 3600 * 30 - 77
    ax = masks.plot(mask, length, block=128, tokens=False)
    expected = masks.block_map(mask, (length, length), (128, 128))
    np.testing.assert_array_equal(drawn(ax), expected)
    assert ax.images[0].get_extent() == [0, 844 * 128, 844 * 128, 0]
    assert ax.images[0].get_clim() == (0, 2)
    assert ax.images[0].get_interpolation() == "auto"
    assert len(shades(ax.images[0])) == 3
    few = masks.plot(mask, 512 * 128, block=128, tokens=False).images[0]
    assert few.get_interpolation() == "nearest"
    assert ax.get_xlim() == (0, length)
    assert len(ax.lines) == 0  # they would cover the picture


def test_draws_on_given_axes_with_data_and_compositions():
    _, ax = plt.subplots()
    mask = masks.Causal() & masks.Segments(jnp.array([0, 0, 1, 1]))
    assert masks.plot(mask, 4, ax=ax) is ax
    np.testing.assert_array_equal(drawn(ax), 3 * mask.materialize(4))


@pytest.mark.usefixtures("untyped")
def test_errors():
    with pytest.raises(ValueError, match=r"plot: the mask must have no batch axis"):
        masks.plot(masks.Padding(key=jnp.array([1, 2])), 4)
    with pytest.raises(ValueError, match=r"plot: `block` must be given"):
        masks.plot(masks.Causal(), 4, tokens=False)
    with pytest.raises(ValueError, match=r"plot: lengths must be at most 8192"):
        masks.plot(masks.Causal(), 8193)
    with pytest.raises(ValueError, match=r"plot: `query_length` must be at least 1"):
        masks.plot(masks.Causal(), 0)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    real_import = builtins.__import__

    def without_matplotlib(name, *arguments, **options):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real_import(name, *arguments, **options)

    for name in list(sys.modules):
        if name.startswith("matplotlib"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match=r"plot: needs matplotlib"):
        masks.plot(masks.Causal(), 4)
