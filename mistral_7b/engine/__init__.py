"""Many requests at once. In reading order:

config       what an engine may use
pages        KV pages: allocation, reference counts, the prefix cache
request      a request and the sequences of its completions
scheduler    which sequence feeds how many tokens in the next step
batch        the cache of one step: packed tokens over pages
in_flight    a launched step: what it feeds and samples, and its unread tokens
forward      hidden states and logits of a step, on a GPU as recorded graphs
extras       log-probabilities and pooled hidden states
containment  batched calls, repeated for each request where one fails, so that an error ends its own request alone
drafts       draft tokens of sequences, within a step's budget
speculation  draft tokens by prompt lookup or a draft model, and how many pay off
masks        grammar masks, for which a step waits a bounded time
engine       the loop: plan, launch, read, emit
completion   one continuation as it grows: stop strings, text, log-probabilities
grammar/     structured outputs, followed in worker processes
reading      prompts, conversations and parameters to requests
llm          LLM: all prompts in, all texts out
async_llm    AsyncLLM: requests join and leave while the loop runs in a thread
threads      threads of parallel loops
memory       how much of the memory goes to pages

Imports nothing by itself: the command line reads `config` and `memory`, which need no torch.
"""
