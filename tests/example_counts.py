"""How many examples hypothesis draws: MISTRAL_7B_TEST_EXAMPLES=20 makes it twenty times as many, a long search."""

from __future__ import annotations

import os

from hypothesis import settings

TIMES = int(os.environ.get("MISTRAL_7B_TEST_EXAMPLES", "1"))
FEW, SOME, MANY = (settings(max_examples=TIMES * n, deadline=None) for n in (20, 50, 150))
