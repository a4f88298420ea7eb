"""Trained adapter -> how strongly each layer acts, so that the model keeps what it knew.

In: a model with a trained adapter, batches of its task and of what to keep, or texts that the model writes itself. Out:
a strength for each layer, what each choice costs, and the adapter at its strengths.
"""
