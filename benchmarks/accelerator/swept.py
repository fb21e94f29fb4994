"""Kernels whose tiles come from a cost model, and how to make them with other tiles."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol
from unittest import mock

import jax.numpy as jnp

from benchmarks.compile_kernels.cases_sweep import row_program
from pallas_kernels import _devices
from pallas_kernels.gpu_mosaic import (
    _row_tiles as gpu_rows,
    attention_tiles as gpu_attention,
    row_statistics as gpu_statistics,
)
from pallas_kernels.tpu import (
    _row_tiles as tpu_rows,
    attention_tiles as tpu_attention,
)
from softlib import attention, masks
from softlib.attention._engine import kernels_gpu, kernels_tpu

from .problem import Program, Size

type Sizes = tuple[int, ...]

HEADS = {
    "dry": (64, 128, 768),
    "Gemma 2 head": (8192, 2304, 256_000),
    "Llama 3 head": (8192, 4096, 128_256),
    "GPT-2 head": (16_384, 768, 50_304),
}
# Batch entries, tokens, heads and features of causal attention.
ATTENTION = {
    "dry": (1, 512, 1, 128),
    "8k tokens": (2, 8192, 16, 128),
    "2k tokens": (8, 2048, 16, 128),
}
CAUSAL = masks.Causal()


class Swept(Protocol):
    """One kernel: its shapes by name, its tiles, and its program."""

    @property
    def kernel(self) -> str:
        """The name in files of measured times."""
        ...

    @property
    def platform(self) -> str:
        """The platform that it is for: `tpu` or `cuda`."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Those to be timed, and `dry`."""
        ...

    def modelled(self, shape: str) -> dict[Sizes, float]:
        """Seconds of every candidate by the model alone, on the device of the context.

        The first of the cheapest is the default where nothing was measured.
        """
        ...

    def size(self, shape: str) -> Size:
        """The shapes of its arrays, which `Size.arrays` draws."""
        ...

    def program(self, shape: str, sizes: Sizes) -> Program:
        """The function of the arrays, with these tiles whenever it is traced."""
        ...


def _head_size(name: str) -> Size:
    rows, features, classes = HEADS[name]
    shapes = ((rows, features), (classes, features), (rows, 1))
    return Size(shapes, integers={2: classes}, scales={1: features**-0.5})


@dataclasses.dataclass(frozen=True)
class TpuRows:
    """A pass of the row statistics on TPUs."""

    kind: tpu_rows.Pass
    platform = "tpu"
    shapes = HEADS

    @property
    def kernel(self) -> str:
        return tpu_rows.NAMES[self.kind]

    def size(self, shape: str) -> Size:
        return _head_size(shape)

    def modelled(self, shape: str) -> dict[Sizes, float]:
        device, own = _devices.tpu(), self._shapes(shape)
        fitting = tpu_rows.fitting(self.kind, own, device)
        ordered = sorted(fitting, key=lambda tiles: tiles.vmem_bytes)
        return {
            tpu_rows.sizes_of(own, tiles): tpu_rows.seconds(
                self.kind, own, tiles, device
            )
            for tiles in ordered
        }

    def program(self, shape: str, sizes: Sizes) -> Program:
        own = self._shapes(shape)
        rows, classes, parts = sizes
        tiles = tpu_rows.tiles(self.kind, own, rows, classes, own.features // parts)

        def run(hidden: Any, weight: Any, labels: Any) -> Any:
            numbers = jnp.ones(len(hidden), jnp.float32)
            return row_program(self.kind, tiles, hidden, weight, labels, numbers)

        return run

    def _shapes(self, shape: str) -> tpu_rows.Shapes:
        return tpu_rows.Shapes(*HEADS[shape], 2, 2, labels=True)


@dataclasses.dataclass(frozen=True)
class GpuGradients:
    """The backward pass of the row statistics on Hopper."""

    kernel = gpu_rows.NAME
    platform = "cuda"
    shapes = HEADS

    def size(self, shape: str) -> Size:
        return _head_size(shape)

    def modelled(self, shape: str) -> dict[Sizes, float]:
        own, device = gpu_rows.Shapes(*HEADS[shape]), _devices.gpu() or _devices.H100
        return {
            sizes: gpu_rows.seconds(own, sizes, device)
            for sizes in gpu_rows.candidates(own)
        }

    def program(self, shape: str, sizes: Sizes) -> Program:
        chunk, features = sizes
        own, device = gpu_rows.Shapes(*HEADS[shape]), _devices.gpu() or _devices.H100
        tiles = gpu_rows.backward_tiles(own, (chunk, features), device)
        options = gpu_statistics.Options(statistics=("lse", "label_logits"))

        def run(hidden: Any, weight: Any, labels: Any) -> Any:
            operands = gpu_statistics.Operands(hidden, weight, labels, {}, {})
            numbers = jnp.ones(len(hidden), jnp.float32)
            known = {"lse": numbers, "g_lse": numbers}
            return gpu_statistics.gradient(
                options, operands, known, numbers[:, None], tiles=tiles
            )

        return run


def _attention_size(name: str) -> Size:
    return Size((ATTENTION[name],) * 3, scales={0: 3.0})


def _attend(forced: Callable[[], contextlib.AbstractContextManager[Any]]) -> Program:
    def run(query: Any, key: Any, value: Any) -> Any:
        with forced():
            return attention.dot_product_attention(query, key, value, mask=CAUSAL)

    return run


@dataclasses.dataclass(frozen=True)
class TpuAttention:
    """The forward pass of attention on TPUs."""

    kernel = tpu_attention.NAMES["forward"]
    platform = "tpu"
    shapes = ATTENTION

    def size(self, shape: str) -> Size:
        return _attention_size(shape)

    def modelled(self, shape: str) -> dict[Sizes, float]:
        _, tokens, _, features = ATTENTION[shape]
        lengths, heads = (tokens, tokens), (features, features)
        device, found = _devices.tpu(), {}
        for sizes, tiles in self._tiles(shape).items():
            kinds = masks.block_map(CAUSAL, lengths, (tiles.query, tiles.key))
            found[sizes] = tpu_attention.seconds(
                *("forward", tiles, heads, jnp.bfloat16, device),
                visited=float((kinds != masks.Block.NONE).sum()),
                partial=float((kinds == masks.Block.SOME).sum()),
            )
        return found

    def program(self, shape: str, sizes: Sizes) -> Program:
        tiles = self._tiles(shape)[sizes]
        return _attend(
            lambda: mock.patch.object(kernels_tpu, "_cheapest", return_value=tiles)
        )

    def _tiles(self, shape: str) -> dict[Sizes, tpu_attention.Tiles]:
        _, tokens, _, features = ATTENTION[shape]
        lengths, heads = (tokens, tokens), (features, features)
        found = tpu_attention.candidates(
            "forward", lengths, heads, jnp.bfloat16, _devices.tpu()
        )
        return {(tiles.query, tiles.key): tiles for tiles in found}


@dataclasses.dataclass(frozen=True)
class GpuAttention:
    """The forward pass of attention on Hopper, whose tiles come from a rule."""

    kernel = gpu_attention.NAME
    platform = "cuda"
    shapes = ATTENTION

    def size(self, shape: str) -> Size:
        return _attention_size(shape)

    def modelled(self, shape: str) -> dict[Sizes, float]:
        features, device = ATTENTION[shape][-1], _devices.gpu() or _devices.H100
        found = gpu_attention.candidates(features, features, device)
        # The rule takes the first: all cost the same until they are measured.
        return {(tiles.keys, tiles.stages): 1.0 for tiles in found}

    def program(self, shape: str, sizes: Sizes) -> Program:
        tiles = gpu_attention.Tiles(*sizes)
        return _attend(
            lambda: mock.patch.object(kernels_gpu, "choose_tiles", return_value=tiles)
        )


_PASSES: tuple[tpu_rows.Pass, ...] = ("forward", "hidden", "weight")
SWEPT: tuple[Swept, ...] = (
    *map(TpuRows, _PASSES),
    TpuAttention(),
    GpuGradients(),
    GpuAttention(),
)
