"""`python -m compress`: the same command line as the console script."""

from .cli.main import main

if __name__ == "__main__":
    main()
