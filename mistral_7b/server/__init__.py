"""HTTP server for the OpenAI, Anthropic and Mistral APIs, on top of AsyncLLM. In reading order:

config        server settings: limits, timeouts, access
state         state that all routes share, and `answer`, which runs one request
http/         guard, access, connections, JSON bodies, errors, server-sent events
openai/       chat completions, responses, completions, embeddings, models, tokens
anthropic/    messages
operations/   health, metrics, tracing, logs, adapters
page          the chat page, whose files are in web/
app           builds the FastAPI application
serve         the server process: listen, drain, shut down

No route opens a path, renders a template or unpickles data named by a request.
"""
