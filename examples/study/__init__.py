"""What the studies share: scripts that train a few small models and compare them.

`program` the end of a script, `command_line` options from a dataclass, `training` the
loop with exact resume, `output` files and the look of pictures, `packed_text` the data,
`intervals` of numbers over seeds and items, `results` what pages draw from, `wordnet`
nouns and what is above them, `minilm` features of sentences.
A study itself is in the folder of its script: `radial_video_model`, `extrapolation`,
`triple_detection_model`, `grokking_study`, `simplex_flow_model`,
`spherical_head_model`, `extreme_classifier`, `distillation_study`,
`preference_tuning_model`, `fourier_head_study`, `uncertain_answers_study`,
`generated_text_study`, `soft_thinking_study`, `utility_probability_study`,
`generative_heads_study` and `speculative_study`.
"""
