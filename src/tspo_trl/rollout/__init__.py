"""Turning prompts into trajectories: the search loop, its protocols and limits, the record of a rollout and its log.

May import: `engines`, `retrieval`, `support`.
"""
