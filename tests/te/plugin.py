"""Pytest plugin of the contract's own process: installs the twin before anything is collected."""

import torch

from tests.rounding import order_free_addmm_, order_free_mm
from tests.te import twin

twin.install()
torch.set_num_threads(1)  # fixtures of a module run before the one that says so for tests
# The library pads rows where the reference does not, and a kernel may sum padded ones in another order.
torch.mm, torch.Tensor.addmm_ = order_free_mm, order_free_addmm_
