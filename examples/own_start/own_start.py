"""A start and a policy in a package of its own: `pip install examples/own_start`, then `init ... --method tail`.

A of the start reads where the data leave room: random orthonormal directions outside the principal ones. Made from text
that should not be forgotten, such an adapter hardly sees that text while it learns something else (the idea of
LoRA-Null, arXiv 2503.02659, which takes the null space of the inputs in place of what lies beyond their leading
directions).
"""

from lora_init import LoraInitError, Policy, Start


def tail(spectrum, rank, generator):
    """Return A, [rank, d_in]: orthonormal rows, orthogonal to the principal directions [k, d_in] of what is read."""
    import torch  # here, so that `lora-init --help` stays quick

    principal = spectrum.components.double()
    n_known, width = principal.shape
    if rank + n_known > width:
        raise LoraInitError(
            f"{n_known} of {width} directions are the data's, and rank {rank} asks for more than are left."
        )
    drawn = torch.randn(rank, width, generator=generator, dtype=torch.float64)
    outside = drawn - drawn @ principal.T @ principal
    return torch.linalg.qr(outside.T).Q.T.float()


# matched: the rows keep their length
TAIL = Start("tail", "random orthonormal directions outside those of the data", function=tail, matched=True)


def spread(ratios, widths):
    """Value the j-th rank of a layer, [n, K], at its share of standard deviation: more even than by variance."""
    return ratios**0.5


SPREAD = Policy(spread)  # lora-init ranks ... --policy spread
