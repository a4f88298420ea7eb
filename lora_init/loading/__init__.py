"""From names to models and batches.

In: a directory, a file or a hub id. Out: a model with its tokenizer, and batches of tokens with labels.
"""
