"""Trained adapter -> what an inference engine loads.

In: an adapter directory as PEFT or this package writes it. Out: the same adapter in one rank for every layer, in fewer
ranks, as a GGUF file or for MLX, or merged into its base; and the command that serves it.
"""
