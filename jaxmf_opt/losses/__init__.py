"""DP-MF losses whose hyperparameters are arrays."""
