"""What runs train on."""
