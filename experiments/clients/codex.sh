#!/bin/sh
# Codex CLI: one turn. Its prompt has about 13,000 tokens, and it sets no token limit: this takes minutes on two cores.
set -eu
url=${1:-http://127.0.0.1:8000}
CODEX_HOME=$(mktemp -d)
work=$(mktemp -d)
export CODEX_HOME
trap 'rm -rf "$CODEX_HOME" "$work"' EXIT
cat > "$CODEX_HOME/config.toml" <<END
model = "demo"
model_provider = "local"
[model_providers.local]
name = "local"
base_url = "$url/v1"
wire_api = "responses"
request_max_retries = 0
stream_max_retries = 0
END
npx codex exec --skip-git-repo-check --sandbox read-only --cd "$work" --output-last-message "$work/last" \
    "Say hello" < /dev/null
test -s "$work/last"
npx codex --version
echo "ok"
