"""Small helpers that several packages share: atomic replacement of files, Markdown tables, HTTP clients, retries.

May import: nothing else of the library.
"""
