"""Kernels give the same bits with any number of threads."""

import torch

THREADS = (1, 2, 3)


def same_with_any_threads(make, *written):
    """Runs what ``make(num_threads)`` gives; what it writes has the same bits each time."""
    found = []
    for threads in THREADS:
        for tensor in written:
            tensor.fill_(-7)
        make(threads)()
        found.append([t.clone() for t in written])
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert torch.equal(one.view(torch.int32), other.view(torch.int32))
    return found[0]


def drawn(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
