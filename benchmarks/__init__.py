"""Speed and memory, measured against the way it is usually done: `make bench`."""
