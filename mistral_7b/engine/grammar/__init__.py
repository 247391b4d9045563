"""Text that keeps to a grammar. In the order of reading:

lark         what is wanted of a text, written as a grammar
schema       a JSON schema, read; a $ref in it is found by pointers.py
shapes       what a schema allows: numbers, texts, arrays and objects that can be intersected
rules        a schema's rules, which never come to a dead end
strings      terminals of JSON strings; patterns.py rewrites regular expressions for them
digits       terminals of numbers between bounds
vocabulary   the tokens as llguidance knows them, and masks over them
matcher      where one completion stands in its grammar, and which tokens may come next

Imports nothing by itself.
"""
