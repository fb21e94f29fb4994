"""Gumbel-softmax flow matching on human splice sites; `session` is the whole run.

`sites` the data and how near a sample is to them, `model` denoiser, classifier and the
calls of the flow, `exact` the best denoiser there is, `toy` the flow of three symbols,
`report` the picture, `options` the command line.
"""
