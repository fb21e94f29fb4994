"""Devices that `explain` can be asked about, whether or not one is here."""

import contextlib
import dataclasses
from typing import Any

import jax
from jax.sharding import AbstractDevice

# Names that users write, and what JAX calls the devices.
NAMED = {
    "cpu": AbstractDevice("cpu", None, "cpu"),
    "a100": AbstractDevice("NVIDIA A100-SXM4-80GB", None, "gpu"),
    "h100": AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu"),
    "b200": AbstractDevice("NVIDIA B200", None, "gpu"),
    "v4": AbstractDevice("TPU v4", None, "tpu"),
    "v5e": AbstractDevice("TPU v5 lite", None, "tpu"),
    "v5p": AbstractDevice("TPU v5", None, "tpu"),
    "v6e": AbstractDevice("TPU v6 lite", None, "tpu"),
    "tpu7x": AbstractDevice("TPU7x", None, "tpu"),
}


@dataclasses.dataclass(frozen=True)
class Device:
    """A device that an explanation is about.

    Attributes:
        name: As in the explanation.
        abstract: As in a mesh.
    """

    name: str
    abstract: AbstractDevice

    @property
    def platform(self) -> str:
        """The platform for which its programs are lowered."""
        platform = self.abstract.platform
        return "cuda" if platform == "gpu" else platform

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which all find this device in place of the mesh's own."""
        mesh = jax.sharding.get_abstract_mesh().update(abstract_device=self.abstract)
        return jax.sharding.use_abstract_mesh(mesh)


def named(device: str | AbstractDevice) -> Device:
    """The device of this name, or of JAX's description.

    Raises:
        ValueError: the name is unknown.
    """
    if isinstance(device, AbstractDevice):
        return Device(device.device_kind, device)
    if device not in NAMED:
        raise ValueError(
            f"explain: `device` must be one of {', '.join(NAMED)}, or a "
            f"jax.sharding.AbstractDevice, got {device!r}."
        )
    return Device(device, NAMED[device])
