"""Data to train and test on: datasets that a user names, and worlds, which are made."""
