"""Datasets that runs train on."""
