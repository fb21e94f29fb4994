"""Links between devices at the speeds that their makers state, and times from bytes.

No time here is measured. A time is bytes by bytes per second, as if nothing else
happened and no link waited.
"""

import dataclasses
from collections.abc import Iterable

from pallas_kernels._devices import H100, V5P

from .collectives import Collective


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices and their links.

    Attributes:
        name: Of the device.
        flops: Per second, products of bfloat16 with sums in float32.
        memory: Bytes of a device.
        near: Name of the links within a host.
        near_bytes: Per second and device, one way.
        far: Name of the links between hosts; None if all links are alike.
        far_bytes: Per second and device, one way.
    """

    name: str
    flops: float
    memory: int
    near: str
    near_bytes: float
    far: str | None = None
    far_bytes: float = 0.0

    def near_seconds(self, collectives: Iterable[Collective]) -> float:
        return sum(each.sent for each in collectives) / self.near_bytes

    def far_seconds(self, collectives: Iterable[Collective]) -> float:
        if self.far is None:
            return 0.0
        return sum(each.sent_between_hosts for each in collectives) / self.far_bytes

    def seconds(self, collectives: Iterable[Collective]) -> float:
        """Both kinds of links work at the same time, as in NCCL's rings."""
        every = tuple(collectives)
        return max(self.near_seconds(every), self.far_seconds(every))


# NVLink 4: 900 GB/s, both ways together. One port of InfiniBand NDR, 400 Gb/s, a GPU.
GPUS = Machine("H100", H100.flops, 80 << 30, "NVLink", 450e9, "InfiniBand", 50e9)
# A chip, which is one device: 4,800 Gb/s over its six links. No host has faster ones.
TPUS = Machine("TPU v5p", V5P.cores * V5P.flops, 95 << 30, "ICI", 600e9)
MACHINES = (GPUS, TPUS)
