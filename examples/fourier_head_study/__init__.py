"""Forecasts of oil prices and sunspots as distributions; `session` is the whole run.

`series` the data as windows and bins, `model` the network with either head, `report`
the picture, `options` the command line.
"""
