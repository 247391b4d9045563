"""Ollama's API.

bodies     request bodies, and their conversion to OpenAI's message format; imports no torch
answers    response bodies; imports no torch
generate   /api/chat and /api/generate
embed      /api/embed and /api/embeddings
models     /api/tags, /api/ps, /api/show, /api/version
router     all of them
routes     what they share
"""
