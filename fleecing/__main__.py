"""`python -m fleecing` is the command `fleecing`."""

from fleecing.cli.main import main

if __name__ == "__main__":
    main(prog_name="fleecing")
