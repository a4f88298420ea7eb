"""The learning rate of an adapter, by arithmetic alone.

In: how far a step moves each layer, and how long the training is. Out: a `LearningRate`. No torch is imported; the
forward pass that measures a model stands in `adapters/measured_rate.py`.
"""
