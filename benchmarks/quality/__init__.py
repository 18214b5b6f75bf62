"""Does it help? Trained models, with controls and seeds: ``python -m benchmarks.quality TASK``."""
