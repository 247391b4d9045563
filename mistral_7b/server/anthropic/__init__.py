"""Anthropic's Messages API.

bodies     request bodies; imports no torch
wire       their conversion to OpenAI's message format; imports no torch
events     the events of a streamed message; imports no torch
messages   /v1/messages and its token count
"""
