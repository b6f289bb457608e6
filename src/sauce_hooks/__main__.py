"""`python -m sauce_hooks`, which is what `torchrun -m` and `accelerate launch -m` start."""

from sauce_hooks.cli import main

main()
