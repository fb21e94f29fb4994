"""Speed, memory and errors of the linear cross-entropy beside its peers: `make bench`.

- `cases`: shapes and their operands; `programs`: what is compared; `products`: a bound.
- `measure`: timing in turns; `torch_worker`, `torch_process`: the same for PyTorch.
- `speed`, `correctness`, `growth`: the three kinds of measurement.
- `results`: the records; `report`, `figure`: what is made of them.
"""
