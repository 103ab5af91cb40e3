"""Does a model family fulfil the adapter contract? The checks behind ``fastvideo conformance`` and the test suite."""
