"""Trained adapters of one base model -> a start for a new task.

In: a directory with adapters, what their prompts look like to an encoder, and perhaps their statistics; and examples of
the new task. Out: an `AdapterInit` whose B is not zero: the nearest adapter, a mixture, or a generated one.
"""
