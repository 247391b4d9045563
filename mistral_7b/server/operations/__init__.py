"""What people who run a server need.

health     live and ready
metrics    Prometheus
tracing    OpenTelemetry spans; imported only when enabled
json_log   log records as lines of JSON
lag        how long the event loop was blocked
adapters   load and unload LoRA adapters at run time
"""
