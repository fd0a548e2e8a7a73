"""Builders, servers and scripts that the tests share."""
