import inspect

import pytest

from docs import docstring_markup
from tests import public_names

DOCSTRING = r"""
    Loss of `logits` (in nats).

    With $\ell = -\log p_y$ it is

    $$L_\tau = \frac{e^{(1 - \tau)\ell} - 1}{1 - \tau} .$$

    Kept for the backward pass:
    - `logits`, as they are;
    - no **second** buffer of rows * V, lse**2 or name_ in text.

    Args:
        logits: Unnormalised log-probabilities; with
            a second line and $x$.
        labels, where: Two that share a meaning.

    Returns:
        Loss per example. See `softlib.masked_mean`.

    Raises:
        TypeError: `logits` is not floating.  ValueError: `labels` has
            another shape.

    Derivatives: forward and reverse mode,
        any order.
    Cost: O(rows * V); the second line
    of it is not indented.

    Example:
        >>> print("`a`", 2**3)
        `a` 8
    """

REST = r"""
Loss of ``logits`` (in nats).

With :math:`\ell = -\log p_y` it is


.. math:: L_\tau = \frac{e^{(1 - \tau)\ell} - 1}{1 - \tau} .



Kept for the backward pass:

- ``logits``, as they are;
- no **second** buffer of rows * V, lse\*\*2 or name\_ in text.

:param logits: Unnormalised log-probabilities; with
    a second line and :math:`x`.
:param labels: Two that share a meaning.
:param where: Two that share a meaning.
:returns: Loss per example. See ``softlib.masked_mean``.
:raises TypeError: ``logits`` is not floating.
:raises ValueError: ``labels`` has
    another shape.
:Derivatives: forward and reverse mode,
    any order.
:Cost: O(rows * V); the second line
    of it is not indented.

.. rubric:: Example

>>> print("`a`", 2**3)
`a` 8
"""


def test_a_docstring_becomes_restructured_text():
    actual = docstring_markup.to_rest(inspect.cleandoc(DOCSTRING))
    assert actual.strip() == REST.strip()


@pytest.mark.parametrize(
    ("markdown", "rest"),
    [
        ("`x`s and `y`.", r"``x``\ s and ``y``."),
        ("costs $2 and 3$ more", "costs :math:`2 and 3` more"),
        (
            "see [a page](https://example.org/a_b_)",
            "see `a page <https://example.org/a_b_>`__",
        ),
        ("|x| and *so* **on**", r"\|x\| and *so* **on**"),
        ("`a|b*c_`", "``a|b*c_``"),
        ("a\n```python\nx = 1\n```\nb", "a\n\n.. code-block:: python\n\n   x = 1\n\nb"),
        ("text\n1. one\n2. two", "text\n\n1. one\n2. two"),
    ],
)
def test_markup(markdown, rest):
    assert docstring_markup.markup(markdown) == rest


def test_what_it_cannot_render_is_an_error():
    with pytest.raises(ValueError, match="table"):
        docstring_markup.to_rest("A.\n\n| a | b |\n| - | - |")
    with pytest.raises(ValueError, match="name: meaning"):
        docstring_markup.to_rest("A.\n\nArgs:\n    just text without a name")


def test_every_public_docstring_can_be_rendered():
    names = [n for n in public_names.public_names() if callable(n.value)]
    documented = [(name.address, name.value) for name in names]
    for name in names:
        members = vars(name.value).items() if inspect.isclass(name.value) else ()
        documented += [(f"{name.address}.{member}", value) for member, value in members]
    refused = []
    for address, value in documented:
        try:
            docstring_markup.to_rest(inspect.getdoc(value) or "")
        except ValueError as error:
            refused.append(f"{address}: {error}")
    assert refused == []
