"""The parts of `speculative_decoding.py`, one idea a file.

`options` the command line, `texts` prompts and the text that drafts are counted on,
`replay` the calls that a draft saves, `generation` answers with and without a draft,
which are timed, `law` how often a draft is right against the text that it was counted
on, `report` the picture, `session` all of it in order.
"""
