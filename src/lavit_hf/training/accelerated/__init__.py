"""A training loop with accelerate, for the models that `Trainer` is not made for."""
