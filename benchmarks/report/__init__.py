"""What the results say: ``python -m benchmarks.report`` writes RESULTS.md and its pictures."""
