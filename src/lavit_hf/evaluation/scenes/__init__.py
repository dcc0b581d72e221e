"""What only scenes allow to measure, because all about them is known."""
