"""Data to train and test on that is made, not downloaded."""
