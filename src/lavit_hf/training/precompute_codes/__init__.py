"""`lavit tokenize`: images of a dataset to codes, once, on as many machines as there are."""
