"""Evaluation of a model outside the trainer: rollouts, scores with intervals, comparisons, and their files.

May import: `agent`, `credit`, `scoring`, `rollout`, `engines`, `retrieval`, `questions`, `support`.
"""
