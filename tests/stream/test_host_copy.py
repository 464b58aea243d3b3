"""Tensors on their way to the host."""

import torch

from marlin_tools.stream.host_copy import fetched_together


def test_parts_of_one_allocation_travel_together_and_come_out_as_they_were() -> None:
    whole = torch.arange(4096, dtype=torch.int32).view(64, 64)
    tensors = {
        "last": whole[48:],
        "other": torch.randn(3, 5, dtype=torch.float16),
        "first": whole[2:20],
        "strided": whole[:, ::2],
        "half": whole.view(torch.float16)[30:31],
        "shape": torch.tensor((7, 9)),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
    }
    fetched = fetched_together(tensors)
    assert list(fetched) == list(tensors)
    for name, tensor in tensors.items():
        assert fetched[name].dtype == tensor.dtype, name
        assert fetched[name].shape == tensor.shape, name
        assert fetched[name].contiguous().numpy().tobytes() == tensor.contiguous().numpy().tobytes(), name
    assert fetched["first"].untyped_storage().data_ptr() == fetched["last"].untyped_storage().data_ptr()
    assert fetched["first"].untyped_storage().nbytes() < whole.nbytes, "what nobody asked for stays"
    whole.zero_()
    assert fetched["first"].count_nonzero() == 18 * 64
