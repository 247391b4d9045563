"""What every route stands on: HTTP, whichever API a client speaks.

guard         ASGI middleware: keys, limits, headers, the access log
access        API keys, host names and origins
connection    one client connection: timeouts and buffer limits
json_bodies   strict parsing of request bodies, and JSON responses
errors        error responses: status and body
sse           server-sent events
"""
