"""How fast it is, beside what this machine could do and what others do on it.

    machine.py     what this machine is; roofline.py  what it could do at best, measured
    work.py        the bytes and operations that a piece of work cannot do without
    jobs.py        one measurement: engine, scheme, what. timing.py runs it, the same way for every engine
    engine_*.py    ours, llama.cpp, transformers: `begin` reads a prompt, `step` decodes one token a row
    process.py     one job in a process of its own, so that peak memory is its own
    run.py         jobs in turn, and records of them; report.py, plot.py  for people
    serving/       many requests at once: rates of arrivals, and what comes of them

Nothing here imports torch until something is measured.
"""

from __future__ import annotations
