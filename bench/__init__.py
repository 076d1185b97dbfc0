"""Benchmarks: commands that write JSON with the machine, the versions and the seed beside their figures."""
