"""What a model is made of, as far as adapters care.

In: a torch model and what selects its layers. Out: targets with their widths, which tokens of a batch count, and
what each expert or convolution reads. Nothing here knows statistics.
"""
