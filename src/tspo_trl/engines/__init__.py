"""Generating turns: an `Engine` continues contexts by one turn each. Engines do not know about searches, protocols or rewards.

May import: `support`.
"""
