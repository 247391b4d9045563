"""Many requests at once: how much comes out, and how long each waits, at one rate of arrivals after another.

    traffic.py       what is asked, and when: drawn beforehand, the same for every engine
    client.py        sends it at its time, whether the engine keeps up or not, and notes when each token comes
    ours.py          this package's engine, in a process of its own; llama_server.py  llama.cpp's
    records.py       what that comes to; report.py, plot.py  for people
    run.py           engines in turn

Nothing here imports torch until something is measured.
"""

from __future__ import annotations
