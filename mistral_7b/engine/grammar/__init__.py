"""Text that keeps to a grammar: which tokens may come next. In the order of reading:

spec         what a request asks for, as data
lark         the same, written as a grammar
schema       a JSON schema, read; a $ref in it is found by pointers.py
shapes       what a schema allows: numbers, texts, arrays and objects that can be intersected
rules        a schema's rules, which never come to a dead end
embedded     the schemas within a user's own Lark grammar
strings      terminals of JSON strings; patterns.py rewrites regular expressions for them
digits       terminals of numbers between bounds
vocabulary   the tokens as llguidance knows them, and masks over them
matcher      where one completion stands in its grammar, and which tokens may come next
worker       a process that follows one grammar, with limits of CPU time and memory
forkserver   the small process that workers are forked from
processes    the two, as the engine's process starts, asks and ends them
turns        which grammars are compiled at one time
client       Grammars and GrammarState, as the engine sees them

spec to forkserver import no torch and no tokenizer: they run in the worker. Imports nothing by itself.
"""
