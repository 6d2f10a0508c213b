"""Benchmarks, one file an op: ``python -m bench`` lists them, ``python -m bench gram`` runs one."""
