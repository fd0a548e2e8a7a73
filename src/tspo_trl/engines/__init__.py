"""Generating turns: an `Engine` continues contexts by one turn each. Knows nothing of searches, protocols or rewards.

May import `support`.
"""
