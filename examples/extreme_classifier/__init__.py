"""Extreme multi-label classification of WordNet's definitions; `session` is the run.

`glosses` the data, `model` the encoder and the table of labels, `objectives` the losses
that are compared, `mining` random batches against batches of clusters, `scores` the
measures, `report` the picture, `options` the command line.
"""
