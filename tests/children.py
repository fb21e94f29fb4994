"""What a test gives the processes that it starts."""

import os
import re


def environment() -> dict[str, str]:
    """This process's, without what would change the devices of the child."""
    flags = os.environ.get("XLA_FLAGS", "")
    flags = re.sub(r"--xla_force_host_platform_device_count=\S*", "", flags)
    return {**os.environ, "XLA_FLAGS": flags}
