"""Inputs as people brought them, one folder of ``inputs/`` each, with what is right: `make field-cases`."""
