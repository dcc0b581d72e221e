"""What the parts of the method are worth: variants of lavit-scenes that each lack one of them."""
