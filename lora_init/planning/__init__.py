"""Statistics + budget -> plan: how many ranks each layer gets.

In: `Statistics` and a budget. Out: a `RankAllocation`, its file, and its words for other tools.
No model is needed.
"""
