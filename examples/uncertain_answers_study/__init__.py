"""Uncertainty of a language model's answers, against the truth of WordNet.

`questions` what is asked and which answers are right, `sampling` a greedy answer and
samples to each question with their scores, `scores` what the scores say about wrong
answers, `report` the picture, `options` the command line, `session` all of it in order.
"""
