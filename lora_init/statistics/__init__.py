"""The mathematics of directions, and the thing that is kept.

In: rows of activations and gradients, batch by batch. Out: spectra, `Statistics` of all layers, their merge and
their file. Nothing here runs a model.
"""
