"""Statistics + budget -> plan: how many ranks each layer gets.

In: `Statistics` and a budget. Out: a `RankAllocation`, its file, its pictures, and its words for other tools.
No model is needed.
"""
