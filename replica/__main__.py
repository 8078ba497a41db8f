"""`python -m replica` is the command `replica`."""

from __future__ import annotations

from replica.cli import main

if __name__ == "__main__":
    main()
