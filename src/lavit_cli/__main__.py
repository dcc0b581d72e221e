"""`python -m lavit_cli`, for torchrun and accelerate."""

from . import main

main()
