"""`sauce-hooks`, and `python -m sauce_hooks`, which is what `torchrun -m` and `accelerate launch -m` start."""

import sys


def main() -> None:
    """The command line; Ctrl-C is understood from the first import on, and by a verb once one has begun."""
    try:
        from sauce_hooks import cli

        cli.main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
