"""What the studies share: scripts that train a few small models and compare them.

`program` the end of a script, `command_line` options from a dataclass, `training` the
loop with exact resume, `output` files and the look of pictures. A study itself is in
`radial_video_model`, `extrapolation`, `triple_detection_model`, `grokking_study`,
`simplex_flow_model` and `preference_tuning_model`.
`simplex_flow_model` and `extreme_classifier`.
`simplex_flow_model` and `spherical_head_model`.
`simplex_flow_model` and `fourier_head_study`.
`simplex_flow_model` and `distillation_study`.
"""
