"""`python -m reshard`: the command, where its script isn't on the path."""

from reshard.cli.app import main

if __name__ == "__main__":
    main()
