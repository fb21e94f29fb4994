"""The next two words as one class of 380,000; `session` is the whole run in order.

`pairs` the classes and examples of the text, `model` the network and the training steps
of both heads, `report` the picture, `options` the command line.
"""
