"""The parts of `distillation.py`, in reading order.

`options` the command line, `session` a whole run, `glyphs` images of characters,
`glyph_models` and `glyph_losses` what is trained on them, `text` and `text_losses` the
language models, `memory` what two heads need, `report` the picture.
"""
