"""Benchmarks: each module prints its figures and writes them to ``benchmarks/results``."""
