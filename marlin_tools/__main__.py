"""The entry of the console script and of `python -m marlin_tools`: the command line, and Ctrl-C while it is still read in."""

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Read the command line in and run it; Ctrl-C before it can answer for itself gets the answer that it would give."""
    try:
        from marlin_tools.cli import main as command_line

        command_line()
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\nhint: run the same command again\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
