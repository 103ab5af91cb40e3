"""Checks of the adapter contract, for ``fastvideo conformance`` and the test suite."""
