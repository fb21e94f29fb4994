"""Attention of a sequence that is divided over devices."""
