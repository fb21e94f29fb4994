"""Reads checkpoints of the Llama form: GGUF files, and folders of Hugging Face."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import tokenizers
from flax import nnx
from language_model.failures import Failure, reason
from tokenizers import decoders, models, pre_tokenizers

from .model import Config, Llama


class Pretrained(NamedTuple):
    """A model with its tokenizer.

    Attributes:
        model: With the weights of the checkpoint.
        tokenizer: Text to token ids and back.
        stop: Ids of the tokens that end an answer.
    """

    model: Llama
    tokenizer: tokenizers.Tokenizer
    stop: tuple[int, ...]


class _Name(NamedTuple):
    """One parameter of a layer: ours, that of GGUF, that of Hugging Face."""

    ours: tuple[str, ...]
    gguf: str
    hugging_face: str


_LAYER = (
    _Name(("norm_attention", "scale"), "attn_norm", "input_layernorm"),
    _Name(("query", "kernel"), "attn_q", "self_attn.q_proj"),
    _Name(("key", "kernel"), "attn_k", "self_attn.k_proj"),
    _Name(("value", "kernel"), "attn_v", "self_attn.v_proj"),
    _Name(("attention_out", "kernel"), "attn_output", "self_attn.o_proj"),
    _Name(("norm_feed_forward", "scale"), "ffn_norm", "post_attention_layernorm"),
    _Name(("gate", "kernel"), "ffn_gate", "mlp.gate_proj"),
    _Name(("up", "kernel"), "ffn_up", "mlp.up_proj"),
    _Name(("down", "kernel"), "ffn_down", "mlp.down_proj"),
)
_WHOLE = (
    _Name(("embedding", "embedding"), "token_embd", "model.embed_tokens"),
    _Name(("norm", "scale"), "output_norm", "model.norm"),
)
_HEAD = _Name(("head",), "output", "lm_head")


def from_gguf(path: pathlib.Path, *, dtype: Any = jnp.float32) -> Pretrained:
    """A model from a GGUF file, its quantised weights rounded to `dtype`."""
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError) as error:
        raise Failure(f"cannot read {path}: {reason(error)}.") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    form = fields.get("general.architecture")
    if form != "llama":
        raise Failure(f"{path} must be of the form llama, it is {form}.")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    heads = fields["llama.attention.head_count"]
    width = fields["llama.embedding_length"]
    config = Config(
        vocabulary_size=len(fields["tokenizer.ggml.tokens"]),
        width=width,
        layers=fields["llama.block_count"],
        heads=heads,
        key_heads=fields["llama.attention.head_count_kv"],
        head_size=fields.get("llama.attention.key_length", width // heads),
        feed_forward=fields["llama.feed_forward_length"],
        rotary_base=fields["llama.rope.freq_base"],
        epsilon=fields["llama.attention.layer_norm_rms_epsilon"],
        tied="output.weight" not in tensors,
    )

    def read(name: _Name, layer: int | None) -> np.ndarray:
        whole = (
            f"{name.gguf}.weight"
            if layer is None
            else (f"blk.{layer}.{name.gguf}.weight")
        )
        if whole not in tensors:
            raise Failure(f"{path} has no tensor {whole}.")
        tensor = tensors[whole]
        return gguf.dequantize(tensor.data, tensor.tensor_type)

    model = _assembled(path, config, read, dtype)
    stop = fields["tokenizer.ggml.eos_token_id"]
    return Pretrained(model, _gguf_tokenizer(fields), (int(stop),))


def from_hugging_face(folder: pathlib.Path, *, dtype: Any = jnp.float32) -> Pretrained:
    """A model from a folder with config.json, tokenizer.json and safetensors."""
    try:
        given = json.loads((folder / "config.json").read_text("utf-8"))
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except (OSError, ValueError) as error:
        raise Failure(f"cannot read {folder}: {reason(error)}.") from error
    except Exception as error:  # what tokenizers raises for a file it cannot read
        raise Failure(f"cannot read {folder}/tokenizer.json: {error}.") from error
    config = _hugging_face_config(folder, given)
    files = sorted(folder.glob("*.safetensors"))
    try:
        opened = [safetensors.safe_open(file, framework="flax") for file in files]
    except (OSError, safetensors.SafetensorError) as error:
        raise Failure(f"cannot read {folder}: {reason(error)}.") from error
    places = {name: file for file in opened for name in file.keys()}  # noqa: SIM118

    def read(name: _Name, layer: int | None) -> np.ndarray:
        whole = (
            f"{name.hugging_face}.weight"
            if layer is None
            else (f"model.layers.{layer}.{name.hugging_face}.weight")
        )
        if whole not in places:
            raise Failure(f"{folder} has no tensor {whole}.")
        found = np.asarray(places[whole].get_tensor(whole), np.float32)
        heads = {"attn_q": config.heads, "attn_k": config.key_heads}.get(name.gguf)
        return found if heads is None else _interleaved(found, heads)

    model = _assembled(folder, config, read, dtype)
    ends = given.get("eos_token_id")
    stop = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return Pretrained(model, tokenizer, tuple(stop))


def _hugging_face_config(folder: pathlib.Path, given: Mapping[str, Any]) -> Config:
    """The sizes; what would change the model in another way is refused."""
    wanted = {
        "model_type": "llama",
        "hidden_act": "silu",
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
    }
    for name, value in wanted.items():
        if (got := given.get(name, value)) != value:
            raise Failure(f"{folder}: `{name}` must be {value}, it is {got}.")
    heads, width = given["num_attention_heads"], given["hidden_size"]
    return Config(
        vocabulary_size=given["vocab_size"],
        width=width,
        layers=given["num_hidden_layers"],
        heads=heads,
        key_heads=given.get("num_key_value_heads") or heads,
        head_size=given.get("head_dim") or width // heads,
        feed_forward=given["intermediate_size"],
        rotary_base=given.get("rope_theta", 10_000.0),
        epsilon=given.get("rms_norm_eps", 1e-6),
        tied=given.get("tie_word_embeddings", False),
    )


def _assembled(
    path: pathlib.Path,
    config: Config,
    read: Callable[[_Name, int | None], np.ndarray],
    dtype: Any,
) -> Llama:
    """The model with the tensors that `read` finds, matrices turned to (in, out)."""
    build = lambda: Llama(config, dtype=dtype, rngs=nnx.Rngs(0))
    graph, state = nnx.split(nnx.eval_shape(build))
    shapes = nnx.to_pure_dict(state)

    def put(place: tuple[str, ...], array: np.ndarray) -> None:
        *folders, last = place
        at = shapes
        for folder in folders:
            at = at[folder]
        wanted = at[last].shape
        if array.shape != wanted:
            raise Failure(
                f"{path}: {'.'.join(place)} must be {wanted} by the sizes that it "
                f"states, it is {array.shape}."
            )
        at[last] = jnp.asarray(array, dtype)

    for name in _LAYER:
        layers = [read(name, layer) for layer in range(config.layers)]
        stack = np.stack(layers)
        put(("layers", *name.ours), stack.swapaxes(1, 2) if stack.ndim == 3 else stack)
    for name in _WHOLE if config.tied else (*_WHOLE, _HEAD):
        put(name.ours, read(name, None))
    nnx.replace_by_pure_dict(state, shapes)
    return nnx.merge(graph, state)


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head from pairs (i, i + H/2) to pairs (2i, 2i + 1), as in GGUF."""
    outputs, inputs = weight.shape
    halves = weight.reshape(heads, 2, outputs // heads // 2, inputs)
    return halves.swapaxes(1, 2).reshape(outputs, inputs)


def _gguf_tokenizer(fields: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Byte-level BPE that reads digits one by one, from the fields of a GGUF file."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    found = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    found.decoder = decoders.ByteLevel()
    control = 3  # the kind of tokens that are no text
    kinds = fields["tokenizer.ggml.token_type"]
    found.add_special_tokens(
        [
            tokenizers.AddedToken(token, special=True)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == control
        ]
    )
    return found


def tiny() -> Pretrained:
    """A random model over bytes that runs in milliseconds, for tests."""
    config = Config(257, 32, 2, 4, 2, 8, 48)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {byte: i for i, byte in enumerate(alphabet)} | {"<end>": 256}
    bytes_alone = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    return Pretrained(Llama(config, rngs=nnx.Rngs(0)), bytes_alone, (256,))


def parameters(model: Llama) -> int:
    """Number of parameters, the tied table once."""
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
