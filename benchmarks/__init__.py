"""Benchmarks: one command each, a table with the machine and the versions, the same as JSON."""
