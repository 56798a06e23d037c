import sys

from torchtrain.cli import main

sys.exit(main())
