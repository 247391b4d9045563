"""HTTP server for the OpenAI, Anthropic and Mistral APIs, on top of AsyncLLM. In reading order:

config       server settings: limits, timeouts, access
protocol     request bodies as pydantic models; imports no torch
problems     error responses: status and body
state        state that all routes share, and `answer`, which runs one request
sse          server-sent events
openai       chat completions, completions, embeddings, models
page         the chat page, whose files are in web/
guard        ASGI middleware: keys, limits, headers, the access log
app          builds the FastAPI application
tracing      OpenTelemetry spans; imported only when enabled
connection   one client connection: timeouts and buffer limits
serve        the server process: listen, drain, shut down

No route opens a path, renders a template or unpickles data named by a request.
"""
