import sys

from trainspec.cli import main

if __name__ == "__main__":
    sys.exit(main())
