"""What the parts of the method are worth: variants of a small LaVIT that each lack one of them."""
