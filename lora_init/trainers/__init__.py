"""Trainers that `initialize` is given: one file for each library, and the registry that finds it.

In: a trainer. Out: its model, its batches, the loss it trains by; and its adapter put back into it.
"""
