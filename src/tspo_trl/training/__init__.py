"""The trainer: `TSPOTrainer` and its configuration, generation, credit, checkpoints, metrics and data sets.

May import: `credit`, `chance`, `scoring`, `rewards`, `rollout`, `engines`, `retrieval`, `sharing`, `questions`, `support`.
"""
