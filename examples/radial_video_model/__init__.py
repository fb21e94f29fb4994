"""The parts of `radial_video.py`, one idea a file.

`options` the command line, `video` the clip and its patches, `task` which patches are
hidden and the loss, `model` the transformer and its masks (the file that calls
softlib), `extension` four times as many frames with adapters, `cost` pairs, memory and
time against the length, `report` the picture, `session` all of it in order.
"""
