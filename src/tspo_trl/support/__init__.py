"""Small tools that several packages share: files that are replaced whole, Markdown tables, retries of requests.

Imports nothing else of the library.
"""
