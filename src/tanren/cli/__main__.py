"""bin/tanren runs this: python -m tanren.cli."""

from tanren.cli import main

if __name__ == "__main__":
    main()
