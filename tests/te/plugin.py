"""Pytest plugin of the contract's own process: installs the twin before anything is collected."""

import torch

from tests.te import twin

twin.install()
torch.set_num_threads(1)  # fixtures of a module run before the one that says so for tests
