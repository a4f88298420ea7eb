"""A trainer that another tool makes -> its adapter started, trained beside replayed text, and dialed.

Goes in: a configuration of the tool, with two keys more. Comes out: what the tool saves.
"""
