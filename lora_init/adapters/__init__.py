"""Statistics + plan -> adapter.

In: `Statistics`, ranks and the name of an initialization. Out: an `AdapterInit`, which PEFT reads from a directory or
which goes onto a model. Packages below this one do without PEFT.
"""
