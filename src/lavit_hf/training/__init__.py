"""Training of every stage with `Trainer`, PEFT and accelerate. Needs `pip install lavit-hf[training]`."""
