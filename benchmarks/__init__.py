"""Measurements against peers and against the machine: `python -m benchmarks NAME`, or `make bench`."""
