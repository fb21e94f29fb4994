"""Row statistics and their gradients: brute force in NumPy, float64, closed forms.

The definition, with all N x V logits in memory (a block of rows at a time, so that the
largest shapes fit):

    raw = hidden . weight        u = scale * raw + bias
    cap = c tanh(u / c)          z = cap / temperature

and, over the columns that `class_where` selects, with p = softmax(z):

    lse = log sum e^z   mean_logit = sum p z   sum_logits = sum z
    sum_squared_logits = sum z^2   max_logit = max z   argmax = its lowest index
    sum_softplus = sum log(1 + e^z)
    label_logits = z at the labels, whether selected or not

A label outside [0, V) has logit 0. A row without a selected column has lse and maximum
-inf and 0 for the rest. p z is 0 where z is -inf. The gradients are

    dz = p (g_lse + g_mean (1 + z - mean)) + g_sum + 2 g_sq z + sum_l g_label_l [y_l]
         + g_softplus / (1 + e^-z)
    du = dz / temperature (1 - (cap / c)^2)
    dhidden = (scale du) weight    dweight = (scale du)^T hidden    dbias = sum_n du
    dscale_n = sum_j du raw        dtemperature_n = -sum_j dz z / temperature

Every function also takes complex arrays, so that a complex step can check the gradients
without cancellation.
"""

from typing import NamedTuple

import numpy as np

# Those that kernels have too.
STATISTICS = (
    "lse",
    "label_logits",
    "mean_logit",
    "sum_logits",
    "sum_squared_logits",
    "max_logit",
    "argmax",
)
DIFFERENTIABLE = STATISTICS[:5]
BLOCK = 2**22  # logits in memory at once


class Result(NamedTuple):
    """Values by name, with the batch shape in front; gradients by argument."""

    values: dict
    gradients: dict


def exact(array):
    """The array as it was rounded by its dtype, in float64 (complex stays complex)."""
    array = np.asarray(array)
    return array if np.iscomplexobj(array) else np.asarray(array, np.float64)


# --------------------------------------------------------------- statistics of given z
def selected(z, class_where):
    """The columns that count, per row."""
    if class_where is None:
        return np.ones(z.shape, bool)
    return np.broadcast_to(class_where, z.shape)


def softmax(z, columns):
    """P and lse over the selected columns; rows without a finite logit get p = 0."""
    kept = columns & (z.real > -np.inf)
    top = np.max(z.real, axis=1, initial=-np.inf, where=kept)
    safe = np.where(np.isfinite(top), top, 0.0)
    e = np.where(kept, np.exp(np.where(kept, z, 0) - safe[:, None]), 0)
    total = e.sum(axis=1)
    empty = total == 0
    with np.errstate(divide="ignore"):
        lse = np.where(empty, -np.inf, safe + np.log(np.where(empty, 1, total)))
    return e / np.where(empty, 1, total)[:, None], lse


def softplus(z):
    """Log(1 + e^z)."""
    small = np.where(z.real > 0, -z, z)
    return np.where(z.real > 0, z, 0) + np.log1p(np.exp(small))


def product(p, z):
    """P z, 0 where p is 0 (z may be -inf there)."""
    return np.where(p == 0, 0, p * np.where(p == 0, 0, z))


def statistics_of(z, labels=None, class_where=None):
    """All statistics of the rows of `z` (N, V); labels (N, L)."""
    count = z.shape[1]
    columns = selected(z, class_where)
    some = columns.any(axis=1)
    p, lse = softmax(z, columns)
    values = {
        "lse": lse,
        "mean_logit": product(p, z).sum(axis=1),
        "sum_logits": np.where(columns, z, 0).sum(axis=1),
        "sum_squared_logits": np.where(columns, z * z, 0).sum(axis=1),
    }
    values["sum_softplus"] = np.where(columns, softplus(z), 0).sum(axis=1)
    visible = np.where(columns, z.real, -np.inf)
    values["max_logit"] = visible.max(axis=1)
    values["argmax"] = visible.argmax(axis=1)
    if labels is not None:
        inside = (labels >= 0) & (labels < count)
        found = np.take_along_axis(z, np.where(inside, labels, 0), axis=1)
        values["label_logits"] = np.where(inside & some[:, None], found, 0)
    return values


def statistics_gradient(z, cotangents, labels=None, class_where=None):
    """Dz for cotangents by name, each with the shape of its statistic."""
    columns = selected(z, class_where)
    p, _ = softmax(z, columns)
    dz = np.zeros_like(z)
    if "lse" in cotangents:
        dz += p * cotangents["lse"][:, None]
    if "mean_logit" in cotangents:
        mean = product(p, z).sum(axis=1)
        dz += product(p, 1 + z - mean[:, None]) * cotangents["mean_logit"][:, None]
    if "sum_logits" in cotangents:
        dz += np.where(columns, cotangents["sum_logits"][:, None], 0)
    if "sum_squared_logits" in cotangents:
        dz += np.where(columns, 2 * cotangents["sum_squared_logits"][:, None] * z, 0)
    if "sum_softplus" in cotangents:
        slope = np.exp(z - softplus(z))
        dz += np.where(columns, cotangents["sum_softplus"][:, None] * slope, 0)
    if "label_logits" in cotangents and labels is not None:
        some = columns.any(axis=1)
        for row, several in enumerate(labels):
            for position, label in enumerate(several):
                if 0 <= label < z.shape[1] and some[row]:
                    dz[row, label] += cotangents["label_logits"][row, position]
    return dz


# ------------------------------------------------------------- from the arguments to z
def evaluate(
    function,
    per_row,
    *,
    hidden=None,
    weight=None,
    logits=None,
    vocab_axis=0,
    bias=None,
    scale=None,
    softcap=None,
    temperature=None,
):
    """Runs `function(z, **per_row) -> (values, dz or None)` on blocks of rows.

    The source is `hidden` and `weight`, or `logits`. The arrays of `per_row` have the
    batch axes in front.

    Returns:
        Values with the batch shape, and the gradients that follow from dz for every
        argument given.
    """
    source = exact(hidden if logits is None else logits)
    batch = source.shape[:-1]
    source = source.reshape(-1, source.shape[-1])
    count = len(source)
    by_class = None
    if logits is None:
        by_class = exact(weight) if vocab_axis == 0 else exact(weight).T
    classes = source.shape[1] if by_class is None else by_class.shape[0]
    given = {
        "bias": bias,
        "scale": scale,
        "temperature": temperature,
        "weight": by_class,
    }
    given = {name: exact(a) for name, a in given.items() if a is not None}
    column = lambda name: np.broadcast_to(given.get(name, 1.0), batch).reshape(-1, 1)
    scale, heat = column("scale"), column("temperature")

    gradients = {name: np.zeros(a.shape) for name, a in given.items()}
    gradients["logits" if by_class is None else "hidden"] = np.zeros(source.shape)
    pieces = []
    size = max(1, BLOCK // classes)
    for start in range(0, count, size) or [0]:
        rows = slice(start, start + size)
        raw = source[rows] if by_class is None else source[rows] @ by_class.T
        u = scale[rows] * raw + given.get("bias", 0.0)
        c = softcap
        cap = u if c is None else c * np.tanh(u / c)
        z = cap / heat[rows]
        block = {
            name: a.reshape(count, *a.shape[len(batch) :])[rows]
            for name, a in per_row.items()
        }
        values, dz = function(z, **block)
        pieces.append(values)
        if dz is None:
            continue

        slope = 1.0 if c is None else 1 - (cap / c) ** 2
        du = dz / heat[rows] * slope
        if by_class is None:
            gradients["logits"][rows] = scale[rows] * du
        else:
            gradients["hidden"][rows] = scale[rows] * (du @ by_class)
            gradients["weight"] += (scale[rows] * du).T @ source[rows]
        if "bias" in given:
            gradients["bias"] += du.sum(axis=0)
        per = {"scale": product(du, raw).sum(axis=1)}
        per["temperature"] = -(product(dz, z) / heat[rows]).sum(axis=1)
        for name in per.keys() & given.keys():
            if given[name].ndim:
                gradients[name].reshape(-1)[rows] = per[name]
            else:
                gradients[name] = gradients[name] + per[name].sum()

    names = pieces[0]
    values = {n: np.concatenate([one[n] for one in pieces]) for n in names}
    values = {n: a.reshape((*batch, *a.shape[1:])) for n, a in values.items()}
    if vocab_axis == 1 and "weight" in gradients:
        gradients["weight"] = gradients["weight"].T
    for name in gradients.keys() & {"hidden", "logits"}:
        gradients[name] = gradients[name].reshape((*batch, source.shape[1]))
    return Result(values, gradients)


def row_statistics(labels=None, class_where=None, *, cotangents=None, **source):
    """The statistics by name, and their gradients for `cotangents` by name.

    Labels have the batch shape, or one axis more; `source` goes to `evaluate`.
    """
    data = source.get("hidden", source.get("logits"))
    batch = np.shape(data)[:-1]
    single = labels is not None and np.ndim(labels) == len(batch)
    per_row = {}
    if labels is not None:
        per_row["labels"] = np.asarray(labels)[..., None] if single else labels
    if class_where is not None and np.ndim(class_where) > 1:
        shape = (*batch, np.shape(data)[-1])
        per_row["class_where"] = np.broadcast_to(class_where, shape)
    for name, g in (cotangents or {}).items():
        per_row["g_" + name] = exact(g)
        if name == "label_logits" and single:
            per_row["g_" + name] = exact(g)[..., None]

    def function(z, labels=None, class_where=class_where, **g):
        values = statistics_of(z, labels, class_where)
        if cotangents is None:
            return values, None
        g = {name[2:]: a for name, a in g.items()}
        return values, statistics_gradient(z, g, labels, class_where)

    values, gradients = evaluate(function, per_row, **source)
    if single:
        values["label_logits"] = values["label_logits"][..., 0]
    return Result(values, gradients)
