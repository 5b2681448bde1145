"""Pytest plugin of the contract's own process: installs the twin before anything is collected."""

from tests.te import twin

twin.install()
