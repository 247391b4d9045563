"""Structured outputs: which tokens a grammar allows next. In reading order:

spec           what a request asks for, as data
lark           the same as a grammar in Lark notation
schema         a JSON schema, parsed; json_pointer.py resolves its $refs
shapes         what a schema allows: numbers, strings, arrays and objects, which can be intersected
rules          a schema's Lark rules, which have no dead ends
embedded       JSON schemas inside a user's own Lark grammar
strings        Lark terminals of JSON strings; patterns.py translates regular expressions for them
digits         Lark terminals of numbers between bounds
vocabulary     the tokens as llguidance knows them, and masks over them
matcher        the state of one completion in its grammar, and the mask of its next token
worker         a process that follows one grammar under limits of CPU time and memory
forkserver     the small process that workers are forked from
processes      starts, queries and ends both, from the engine's process
compile_queue  which grammars are compiled at the same time
client         Grammars and GrammarState, which the engine uses

spec to forkserver run in the worker and import neither torch nor a tokenizer. This file imports nothing.
"""
