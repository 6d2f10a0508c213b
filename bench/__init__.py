"""Benchmarks: ``python -m bench`` lists the operations.

``python -m bench gram`` runs one; whole jobs run as ``python -m bench.jobs.cost`` and so on.
"""
