"""Vocabularies: text to token ids, and each id's text, from the tokenizer files beside a model's weights.

    contract.py        Vocabulary: what the tokenizer, the stream decoder and grammars ask of any of them
    sentencepiece.py   tokenizer.model, with added tokens beside it
    fast.py            tokenizer.json
    files.py           what a folder says about its vocabulary: added and named tokens, ends
    folder.py          the choice for a folder

Imports no torch; the `tokenizers` package is imported on first use.
"""
