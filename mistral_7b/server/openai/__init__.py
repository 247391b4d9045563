"""OpenAI's API, with the additions of Mistral and vLLM.

router        all its routes, and /v1/models
model_info    facts about the loaded model for /v1/models
protocol      request bodies as pydantic models; imports no torch
answers       response bodies, whole and in pieces; imports no torch
chat          /v1/chat/completions
responses/     /v1/responses
completions   /v1/completions
embeddings    /v1/embeddings
tokens        /tokenize and /detokenize
logprobs      log-probabilities in both of OpenAI's forms
"""
