"""Many requests at once. In the order of reading:

config       what an engine may use
pages        memory for keys and values in pages, shared by whoever begins alike
request      a request, and the sequences that its completions are
scheduler    who computes what in the next step
batch        the cache of one step: packed tokens over pages
flight       a step on its way: what it feeds and samples, and tokens that nobody has read yet
forward      hidden states and logits of a step, on a GPU as recorded graphs
extras       what is wanted beside tokens: log-probabilities, pooled states
containment  what is done for many requests at once, so that an error ends its own request alone
drafts       draft tokens of sequences, within a step's budget
masks        grammars' answers, which a step waits for a moment and no longer
engine       the loop: plan, launch, read, hand out
grammar/     output that a grammar allows, followed in processes of its own
reading      what users ask, made requests
llm          LLM: all prompts in, all texts out
async_llm    AsyncLLM: requests come and go while the loop runs in a thread
threads      whose the threads of parallel loops are
memory       how much memory there is, and how much of it goes to pages

Imports nothing by itself: the command line reads `config` and `memory`, which need no torch.
"""
