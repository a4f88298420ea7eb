"""What a start is: the registry of starts, and the function of each.

In: what is known of one layer, by the names in `providers.py`. Out: A, or A and B, as `LoraWeights`. Nothing here knows
a model or PEFT.
"""
