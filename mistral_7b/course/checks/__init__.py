"""The checks of the course, one module per exercise, which are copied into the learner's folder.

`check(ex)` raises CourseError if the learner's module `ex` is wrong, and returns what is worth showing, or None.
"""
