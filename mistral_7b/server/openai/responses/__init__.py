"""OpenAI's Responses API, translated to a chat request.

wire           request bodies and items; imports no torch
conversation   items to chat messages, tools to chat tools; imports no torch
events         the Response object and the events of its stream; imports no torch
store          stored responses, for `previous_response_id`; imports no torch
routes         /v1/responses
"""
