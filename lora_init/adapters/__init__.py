"""An adapter: the options that describe it, its form in PEFT, on a model and in a directory.

In: A and B of each layer, as starts return them, and ranks. Out: an `AdapterInit`, which PEFT reads from a directory or
which goes onto a model.
"""
