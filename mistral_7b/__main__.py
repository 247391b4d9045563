"""`python -m mistral_7b` is the command `mistral-7b`."""

import sys

from .cli import main

sys.exit(main())
