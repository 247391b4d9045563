"""The engine: continuous batching of many requests on one model. In reading order:

config         memory, batch size and queue of an engine
counts         counters for metrics
pages          KV pages: allocation, reference counts, the prefix cache
window         pages under a sliding window: which are needed, and how many at a time
request        a request and the state of its sequences
queues         the waiting sequences by client, and the tokens served to each client
shares         each client's share of the engine, and which sequence is preempted
scheduler      which sequence feeds how many tokens in the next step
disk_cache     a scheduler whose prefix cache includes files on disk
fingerprint    hashes of all that determines keys and values besides the tokens
page_contents  the bytes of a KV page
disk_files     the files of the prefix cache, one per page
disk_io        the threads that read and write them
batch          the cache of one step: packed tokens, with keys and values in pages
in_flight      a launched step: what it feeds and samples, and its unread tokens
forward        hidden states and logits of a step; on a GPU, decoding runs as CUDA graphs
extras         log-probabilities and pooled hidden states
containment    isolates errors: an error in a request's own objects ends that request alone
drafts         draft tokens of a step, within its token budget
speculation    speculative decoding by prompt lookup or a draft model
masks          grammar masks, for which a step waits a bounded time
engine         the loop: plan, launch, read, emit
completion     one completion: text, stop strings, log-probabilities, finish reason
grammar/       structured outputs, enforced in worker processes
prompts        prompts tokenized and checked, with their token limits
inputs         prompts, conversations and options to checked requests
keywords       arguments of LLM by name, and vLLM's names for them
llm            LLM: offline inference over many prompts
parallel       an engine over several processes: what it refuses
followers      the processes that follow each step of a server's engine
mailbox        hands pieces from the engine's thread to coroutines
async_llm      AsyncLLM: online inference, with the engine's loop in a thread
threads        releases OpenMP threads
memory         how much memory the KV pages get

The package imports no module by itself: the command line reads `config` and `memory`, which need no torch.
"""
