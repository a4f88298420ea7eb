"""Which start is better: the same training from several starts, everything else equal.

In: a model, a task and names of starts. Out: runs, what they show, and a report.
"""
