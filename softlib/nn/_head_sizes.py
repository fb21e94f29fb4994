"""The sizes of heads that a layer with key heads of their own leaves to be derived."""


def head_sizes(
    name: str,
    features: int,
    num_heads: int,
    num_key_heads: int,
    head_features: int | None,
    value_features: int | None,
) -> tuple[int, int]:
    """Features of a query or key head, and of a value head; `name` is the layer's."""
    if num_heads % num_key_heads:
        raise ValueError(
            f"{name}: `num_key_heads` must divide `num_heads` ({num_heads}), "
            f"got {num_key_heads}."
        )
    if features % num_heads and None in (head_features, value_features):
        raise ValueError(
            f"{name}: `num_heads` must divide `features` ({features}) unless "
            f"`head_features` and `value_features` are given, got {num_heads}."
        )
    size = features // num_heads if head_features is None else head_features
    width = features // num_heads if value_features is None else value_features
    return size, width
