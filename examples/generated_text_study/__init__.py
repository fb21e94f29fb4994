"""Tests of whether a language model wrote a text: levels, and what they miss.

`texts` of the model, of people and of a colder copy of the model, `reading` what the
model says about each token, `errors` of the tests against the length of a text,
`report` the picture, `options` the command line, `session` all of it in order.
"""
