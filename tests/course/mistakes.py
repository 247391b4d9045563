"""Typical mistakes: what a learner writes in the place of a line of the plain solution, and what is said of it."""

from __future__ import annotations

from typing import NamedTuple


class Mistake(NamedTuple):
    exercise: int
    right: str
    wrong: str
    said: tuple[str, ...]  # each is in the message


MISTAKES = [
    Mistake(
        1,
        "torch.sqrt((y * y).mean(dim=-1, keepdim=True) + self.eps)",
        "(torch.sqrt((y * y).mean(dim=-1, keepdim=True)) + self.eps)",
        ("eps belongs under the root", "[0, 0]"),
    ),
    Mistake(1, " + self.eps", "", ("eps is not added",)),
    Mistake(
        1,
        "(y * y).mean(dim=-1, keepdim=True)",
        "y.var(-1, correction=0, keepdim=True)",
        ("RMSNorm(8, eps=0.05)(x)[0, 0] is",),
    ),
    Mistake(
        1,
        "return y.to(x.dtype) * self.weight",
        "return (y * self.weight).to(x.dtype)",
        ("in bfloat16", "cast the normalised x down"),
    ),
    Mistake(1, "x.float()", "x", ("in bfloat16", "convert x to float32 first")),
    Mistake(
        1,
        "return y.to(x.dtype) * self.weight",
        "y.to(x.dtype) * self.weight",
        ("is None", "does not return its result"),
    ),
    Mistake(2, "-2 * i / args.head_dim", "-i / args.head_dim", ("the exponent is -2i/K",)),
    Mistake(2, "angle.cos().to(dtype)", "angle.cos()", ("is of type float64", "or to `dtype` if that is wider")),
    Mistake(2, "dtype = torch.promote_types(dtype, torch.float32)", "pass", ("the result is float32 at least",)),
    Mistake(
        2,
        "i = torch.arange(args.head_dim // 2, dtype=torch.float64)",
        "i = torch.arange(args.head_dim // 2)",
        ("cos at position 32767", "use float64"),
    ),
    Mistake(
        2,
        "positions.double().unsqueeze(-1).unsqueeze(-1)",
        "positions.double().unsqueeze(-1)",
        ("needs an axis for the heads",),
    ),
    Mistake(
        2,
        "a, b = x[..., 0::2].to(cos.dtype), x[..., 1::2].to(cos.dtype)\n"
        "    out = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)",
        "a, b = x.to(cos.dtype).chunk(2, -1)\n    out = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)",
        ("halves are rotated", "neighbours 2i and 2i + 1"),
    ),
    Mistake(
        2, "a * cos - b * sin, a * sin + b * cos", "a * cos + b * sin, b * cos - a * sin", ("turns the other way",)
    ),
    Mistake(
        3,
        "distance < window",
        "distance <= window",
        ("row 4 sees 5 keys, should see 4", "the window counts the query's own key", "W + 1"),
    ),
    Mistake(3, "distance >= 0", "distance > 0", ("row 0 sees 0 keys, should see 1", "sees its own key")),
    Mistake(
        3,
        "p_q.unsqueeze(-1) - p_k.unsqueeze(-2)",
        "p_q.unsqueeze(-2) - p_k.unsqueeze(-1)",
        ("here they are swapped",),
    ),
    Mistake(
        3, "if s_q is not None:", "if False:", ("sequence ids are ignored", "row 0 sees 2 keys, should see 1")
    ),
    Mistake(
        3,
        "distance = p_q.unsqueeze(-1) - p_k.unsqueeze(-2)",
        "distance = p_q.unsqueeze(-1) - torch.arange(p_k.shape[-1]).add(0)",
        ("should see",),
    ),
    Mistake(4, " / q.shape[-1] ** 0.5", "", ("not divided by sqrt(K)",)),
    Mistake(
        4,
        "k = k.repeat_interleave(share, dim=-2).to(wide)\n    v = v.repeat_interleave(share, dim=-2).to(wide)",
        "k, v = torch.cat([k] * share, -2).to(wide), torch.cat([v] * share, -2).to(wide)",
        ("here it reads h % G",),
    ),
    Mistake(4, "-torch.inf", "0.0", ("minus infinity before the softmax",)),
    Mistake(4, "scores.softmax(dim=-1)", "scores.softmax(dim=-2)", ("runs over the keys",)),
    Mistake(
        4,
        "wide = torch.promote_types(q.dtype, torch.float32)",
        "wide = q.dtype",
        ("in bfloat16", "softmax are computed in bfloat16"),
    ),
    Mistake(4, "if causal:", "if False:", ("`causal` is ignored",)),
    Mistake(
        5,
        "gate = self.w1(x)\n        return self.w2(gate * torch.sigmoid(gate) * self.w3(x))",
        "gate = self.w3(x)\n        return self.w2(gate * torch.sigmoid(gate) * self.w1(x))",
        ("here they are swapped",),
    ),
    Mistake(5, "gate * torch.sigmoid(gate)", "torch.sigmoid(gate)", ("silu(a) is a * sigmoid(a)",)),
    Mistake(5, "gate * torch.sigmoid(gate)", "torch.relu(gate)", ("the gate is relu",)),
    Mistake(6, "rotate(k, rope)", "k", ("q is rotated and k is not",)),
    Mistake(
        6,
        "return self.wo(out.flatten(-2))",
        "return self.wo(out)",
        ("ex06_block.py:", "in forward", "RuntimeError"),
    ),
    Mistake(
        6,
        "return h + self.feed_forward(self.ffn_norm(h))",
        "return h + self.feed_forward(self.ffn_norm(x))",
        ("the feed-forward reads x",),
    ),
    Mistake(
        6,
        "h = x + self.attention(self.attention_norm(x), rope, memory)",
        "h = self.attention(self.attention_norm(x), rope, memory)",
        ("attention's result is not added",),
    ),
    Mistake(7, "return self.norm(x)", "return x", ("the final norm is missing",)),
    Mistake(7, "cache = cache.writable()", "pass", ("extend `cache.writable()`",)),
    Mistake(
        7,
        "logits.to(torch.promote_types(logits.dtype, torch.float32))",
        "logits",
        ("converts its result to float32",),
    ),
    Mistake(
        7,
        "weight.view(heads, 2, -1, *weight.shape[1:])",
        "weight.view(heads, -1, 2, *weight.shape[1:])",
        ("permuted the other way",),
    ),
    Mistake(
        7,
        "positions = cache.extend(tokens, sequence_ids)",
        "cache.extend(tokens, sequence_ids)\n        positions = torch.arange(tokens.shape[-1])",
        ("positions start at 0 in every call",),
    ),
    Mistake(
        8,
        "(logits / t).double() - (best[:, None] / t).double()",
        "(logits * t).double() - (best[:, None] * t).double()",
        ("multiplied by the temperature",),
    ),
    Mistake(8, "(62 - (V - 1).bit_length())).long()", "62).long()", ("2^(62 - b)",)),
    Mistake(8, "if sum_so_far >= top * total:", "if sum_so_far > top * total + 2**58:", ("top_p", "cutoff")),
    Mistake(8, "best[k - 1] if k", "best[k] if k", ("top_k keeps one too many",)),
    Mistake(8, "(sums <= target[:, None])", "(sums < target[:, None])", ("weight 0 is chosen", "u=0.00")),
    Mistake(9, "min(len(p), self.window)", "len(p)", ("is 20, expected 8", "memory grows with the text")),
    Mistake(
        9,
        "new = torch.arange(self.length, self.length + T)",
        "new = torch.arange(T)",
        ("each step starts at position 0",),
    ),
    Mistake(9, "if self.entries:", "if False:", ("only the step's own keys are seen",)),
    Mistake(
        9,
        "visible(new, p, self.window)",
        "visible(new, p, self.window and self.window + 1)",
        ("here it sees W + 1",),
    ),
    Mistake(
        9,
        "out = attention(q, k, v, self.cache.mask[None])",
        "n = self.cache.keep\n        k, v = k[:, -n:], v[:, -n:]\n        out = attention(q, k, v, "
        "self.cache.mask[None, :, -n:])",
        ("before the step's first queries have seen them",),
    ),
    Mistake(
        10,
        "self.slot = new[-self.slots :] % self.slots",
        "self.slot = torch.arange(T)[-self.slots :] % self.slots",
        ("slots are counted from the start of each step",),
    ),
    Mistake(10, "self.positions[:, self.slot] = new[-self.slots :]", "pass", ("not updated by extend",)),
    Mistake(
        10,
        "out = attention(q, keys, values, visible(c.new_positions, p, c.window)[None])",
        "self.k[:, c.slot], self.v[:, c.slot] = k[:, -c.slots :], v[:, -c.slots :]\n"
        "        out = attention(q, self.k, self.v, visible(c.new_positions, c.positions[0], c.window)[None])",
        ("before the step's first queries have seen them",),
    ),
    Mistake(
        10,
        "visible(c.new_positions, p, c.window)[None]",
        "(p <= 10**9).expand(len(c.new_positions), -1)[None]",
        ("attend(q, k, v)[",),
    ),
    Mistake(
        11,
        "ids.extend(tokenizer.encode(text, bos=False))",
        "ids.extend(tokenizer.encode(text))",
        ("each piece begins with BOS", "expected [1,"),
    ),
    Mistake(11, "ids = [tokenizer.bos_id]", "ids = []", ("BOS is missing",)),
    Mistake(
        11,
        "model.logits(hidden[:, -1])",
        "model.logits(hidden)[:, -1]",
        ("is 6, expected 1", "only the last one is needed"),
    ),
    Mistake(11, "if token == eos or n == params.max_tokens - 1:", "if token == eos:", ("nothing follows it",)),
    Mistake(
        11,
        "if token == eos or n == params.max_tokens - 1:",
        "if n == params.max_tokens - 1:",
        ("does not end at EOS",),
    ),
    Mistake(12, ".round()", ".trunc()", ("the fraction is cut off",)),
    Mistake(
        12, "torch.where(top > 0, x * (127 / top), 0.0)", "(x * (127 / top))", ("a row of zeros divides by zero",)
    ),
    Mistake(12, "return q, top / 127", "return q, 127 / top", ("this is the inverse",)),
    Mistake(12, "(self.scale[:, b] * s[..., b, :])", "self.scale[:, b]", ("the scales of x are not multiplied",)),
    Mistake(
        12, "q, s = quantize_rows(blocks)", "q, s = blocks, torch.ones_like(blocks[..., :1])", ("Int8Linear(x)[",)
    ),
    Mistake(13, "hashlib.sha256(before + b", "hashlib.sha256(b", ("does not depend on the page before it",)),
    Mistake(
        13,
        'b"".join(t.to_bytes(4, "little") for t in tokens)',
        '"".join(map(str, tokens)).encode()',
        ("without a separator",),
    ),
    Mistake(13, "self._idle.pop(page, None)", "pass", ("remove it from self._idle",)),
    Mistake(13, "next(iter(self._idle))", "next(reversed(self._idle))", ("least recently used",)),
    Mistake(
        13,
        "if page in self._key_of:",
        "if False:",
        ("the idle pages is [], expected [0, 1]", "put it in self._idle"),
    ),
    Mistake(13, "self.holders[page] -= 1", "self.holders[page] = 0", ("freed with its last holder",)),
    Mistake(14, "end = end // self.page * self.page", "pass", ("a chunk ends where a page ends",)),
    Mistake(14, "if more + len(shared) > pool.available:", "if False:", ("compare with pool.available first",)),
    Mistake(14, "for i in shared:", "for i in []:", ("is copied first",)),
    Mistake(14, "while self.waiting and budget >= self.page:", "while False:", ("a waiting request is admitted",)),
    Mistake(
        14,
        "budget -= self._allocate(s, 1, planned, may_preempt)",
        "self._allocate(s, 1, planned, may_preempt)",
        ("max_batch_tokens = 12",),
    ),
    Mistake(
        14,
        "while self.waiting and budget >= self.page:",
        "while self.waiting and not planned:",
        ("continuous batching",),
    ),
]
