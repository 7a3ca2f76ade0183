import sys

from gemma4.cli import main

if __name__ == "__main__":
    sys.exit(main())
