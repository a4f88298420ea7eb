"""Model + data -> adapter, or statistics + plan -> adapter.

In: a model with batches, texts or a trainer; or `Statistics`, ranks and the name of a start. Out: an `AdapterInit`.
The steps stand in `pipeline.py`; `build.py` asks the start of each layer for its A and B.
"""
