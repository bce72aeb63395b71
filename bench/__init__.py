"""Benchmarks: one file each, both sides measured in one run. `make bench NAME=x [DATA=folder]`."""
