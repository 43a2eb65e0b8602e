"""`PackedDataset.gather` writes to memory of the host alone."""

import pytest
import torch

from hotloop.data import open_dataset
from hotloop.errors import DataError


def test_an_output_without_memory_of_the_host_is_refused():
    dataset = open_dataset((torch.randn(8, 3), torch.arange(8)))
    x, y = torch.empty(2, 3), torch.empty(2, dtype=torch.int64)
    places = torch.tensor([5, 1])
    for outputs in ((x.to("meta"), y), (x, y.to("meta"))):
        with pytest.raises(DataError, match="on the CPU"):
            dataset.gather(places, *outputs)
    dataset.gather(places, x, y)
    assert y.tolist() == [5, 1]
