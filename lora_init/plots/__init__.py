"""Pictures of ranks, with matplotlib: loaded when one is drawn, see `on_demand.py`.

In: ranks of layers, a `RankAllocation` with its `Statistics`. Out: figures, and their files.
"""
