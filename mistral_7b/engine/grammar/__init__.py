"""Text that keeps to a grammar. In the order of reading:

lark         what is wanted of a text, written as a grammar
vocabulary   the tokens as llguidance knows them, and masks over them
matcher      where one completion stands in its grammar, and which tokens may come next

Imports nothing by itself.
"""
