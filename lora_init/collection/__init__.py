"""One pass over data: model + batches -> `Statistics`.

Hooks carry rows, the decompositions of `statistics` compute. `collect` is the entrance, `loop` the pass.
"""
