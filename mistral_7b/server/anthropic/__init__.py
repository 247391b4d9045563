"""Anthropic's Messages API.

wire       request and response bodies; imports no torch
events     the events of a streamed message; imports no torch
messages   /v1/messages and its token count
"""
