"""Tests of softlib: a mirror of the package, and checks of the repository itself."""
