"""`python -m trainfit`, for torchrun."""

from trainfit.cli import main

main()
