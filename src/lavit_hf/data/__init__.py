"""Data to train and test on: datasets that a user names, and scenes, which are made."""
