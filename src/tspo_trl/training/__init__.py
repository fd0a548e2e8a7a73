"""The trainer: `TSPOTrainer` and its configuration, generation, credit, checkpoints, metrics and data sets.

May import every package but `evaluation`, `inspect`, `memory`, `demo` and `commands`.
"""
