"""Says what is meant by a keyword that a function does not have."""

import difflib
from collections.abc import Collection

# Options of other libraries, under the names that they have there.
_SQUARED_LOGSUMEXP = ("z_loss", "z_loss_weight", "lse_square_scale")
_ELSEWHERE = {  # with an argument without which the advice is none
    "attention_mask": ("mask", "it is `mask`"),
    "attn_mask": ("mask", "it is `mask`"),
    "causal": ("is_causal", "write `is_causal=True`"),
    "dropout_rate": ("mask", "there is no dropout"),
    "ignore_index": ("where", "write `where=labels != ignore_index`"),
    "label_paddings": ("label_where", "write `label_where=label_paddings == 0`"),
    "logit_paddings": ("label_where", "write `where=logit_paddings == 0`"),
    "mask": ("where", "it is `where`, True for what counts"),
    "reduction": ("where", "`softlib.masked_mean` reduces results per example"),
    "sm_scale": ("scale", "it is `scale`"),
    "targets": ("labels", "it is `labels`"),
    "weight": ("class_weights", "weights of classes are `class_weights`"),
    "window_size": ("local_window_size", "it is `local_window_size`"),
}
# What belongs to logits, whichever loss takes them.
_OF_LOGITS = (
    "bias",
    "class_where",
    "implementation",
    "scale",
    "softcap",
    "temperature",
    "vocab_axis",
    "axis_name",
)


def unknown_argument(function: str, name: str, known: Collection[str]) -> TypeError:
    """The error of a call of `function`, whose arguments are `known`."""
    known = [each for each in known if each != "self"]
    return TypeError(
        f"{function}: got an unexpected keyword argument `{name}`; "
        f"{_what_to_do(name, known)}."
    )


def _what_to_do(name: str, known: Collection[str]) -> str:
    if name in _SQUARED_LOGSUMEXP:
        if "logsumexp_penalty" in known:
            return "the penalty on the squared logsumexp is `logsumexp_penalty`"
        return (
            "the penalty on the squared logsumexp is an option of "
            "`softlib.losses.softmax_cross_entropy`, `logsumexp_penalty`, and of a "
            "router it is `softlib.losses.router_z_loss`"
        )
    if name in _OF_LOGITS and "logits" in known:
        return (
            f"it is an option of the logits: `softlib.LinearLogits(hidden, weight, "
            f"{name}=...)`, or `softlib.logits.StoredLogits(logits, {name}=...)` of an "
            "array"
        )
    needed, hint = _ELSEWHERE.get(name, ("", ""))
    if needed in known:
        return hint
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    if close:
        return f"perhaps `{close[0]}` is meant"
    return "its arguments are " + ", ".join(f"`{each}`" for each in known)
