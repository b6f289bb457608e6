"""`python -m sauce_hooks`, which is what `torchrun -m` and `accelerate launch -m` start."""

import sys

try:
    from sauce_hooks.cli import main
except KeyboardInterrupt:
    sys.exit(130)
main()
