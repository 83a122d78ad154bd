"""Race tests run on one thread: reproducible, and kind to a machine of two cores."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
