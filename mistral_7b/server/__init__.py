"""HTTP: what OpenAI's, Anthropic's and Mistral's clients speak, over AsyncLLM. In the order of reading:

config       what the server may use, and whom it lets in
protocol     the wire's requests and answers; imports no torch
problems     every error, as a status and a body
state        what all routes share, and `answer`: the one way in which a request is followed
sse          server-sent events
openai       chat completions, completions, embeddings, models
page         the chat page, whose files are in web/
guard        before any route: keys, limits, headers, the access log
app          all of it as one application
tracing      spans for OpenTelemetry; imported where they are asked for
connection   a socket: slow readers and slow writers
serve        the process: listening, draining, ending

No route opens a path, runs a template or reads a pickle that a request names.
"""
