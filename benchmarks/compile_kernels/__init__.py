"""Compiles every kernel for machines that are not there, and writes what was found."""
