"""Small helpers that several packages share: atomic replacement of files, Markdown tables.

It imports nothing else of the library.
"""
