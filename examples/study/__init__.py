"""What the studies share: scripts that train a few small models and compare them.

`command_line` options from a dataclass, `training` the loop with exact resume, `output`
files and the look of pictures. A study itself is in `radial_video_model`,
`extrapolation` and `triple_detection_model`.
"""
