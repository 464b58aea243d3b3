"""`python -m marlin_tools`: the command line where the console script is not on the path."""

from marlin_tools.cli import main

if __name__ == "__main__":
    main()
