"""Small helpers that several packages share: atomic replacement of files, devices, HTTP clients, Markdown tables, paths, retries.

May import: nothing else of the library.
"""
