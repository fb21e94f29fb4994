"""Training steps of a large decoder, compiled for devices that are not there.

What devices exchange, compute and keep is read from the compiled programs.
"""
