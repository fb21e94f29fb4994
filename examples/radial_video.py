#!/usr/bin/env python3
"""Fill in a real video with dense and with radial attention, then four times as long.

    python examples/radial_video.py

takes minutes on two CPU cores and leaves numbers and a picture in `runs/radial-video`.
Start reading at `radial_video_model/session.py`; the lines that use softlib are in
`radial_video_model/model.py`.
"""

import sys

from radial_video_model.options import parse
from study import program


def main(arguments: list[str] | None = None) -> int:
    return program.run(parse(arguments), "radial_video_model.session")


if __name__ == "__main__":
    sys.exit(main())
