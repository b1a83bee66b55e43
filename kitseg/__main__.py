"""``python -m kitseg``."""

from kitseg.cli import main

if __name__ == "__main__":
    main()
