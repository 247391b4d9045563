"""A course of 14 exercises that rebuild the model, from RMSNorm to a paged, quantized decoder.

    package's source --skeleton--> DIR/ex01_rmsnorm.py      signatures and docstrings, bodies removed
                     --solution--> what `--solution 1` prints: the same definitions, complete
    texts/, checks/  ----copy----> DIR/texts/, DIR/checks/

    exercises    which definitions of the package make up each exercise
    skeleton     the source of an exercise, with or without its bodies
    folder       the learner's folder: writing it, running its checks
    compare      comparisons that say what differs, where, and which mistake explains it
    setting      small models and inputs for the checks
    loop, demo, int8, decoder    the few definitions that the package needs only here
    checks/      one module per exercise with `check(ex)`; ex is the learner's module

An exercise imports the learner's own earlier exercises, so the last one generates text with a model that is the
learner's in all its parts.
"""
