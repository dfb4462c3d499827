"""``python -m eulerforge``."""

from eulerforge.cli.main import entry

if __name__ == "__main__":
    entry()
