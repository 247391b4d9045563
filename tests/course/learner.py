"""Plain solutions, as a learner may write them, and the files that they make of the skeletons."""

from __future__ import annotations

import textwrap

from mistral_7b.course.exercises import exercise
from mistral_7b.course.skeleton import TODO, skeleton

BODIES: dict[int, dict[str, str]] = {
    1: {
        "forward": """
            y = x.float()
            y = y / torch.sqrt((y * y).mean(dim=-1, keepdim=True) + self.eps)
            return y.to(x.dtype) * self.weight
        """
    },
    2: {
        "rope_phases": """
            i = torch.arange(args.head_dim // 2, dtype=torch.float64)
            frequency = args.rope_theta ** (-2 * i / args.head_dim)
            angle = positions.double().unsqueeze(-1).unsqueeze(-1) * frequency
            dtype = torch.promote_types(dtype, torch.float32)
            return angle.cos().to(dtype), angle.sin().to(dtype)
        """,
        "rotate": """
            cos, sin = rope
            a, b = x[..., 0::2].to(cos.dtype), x[..., 1::2].to(cos.dtype)
            out = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
            return out.reshape(x.shape).to(x.dtype)
        """,
    },
    3: {
        "visible": """
            distance = p_q.unsqueeze(-1) - p_k.unsqueeze(-2)
            mask = distance >= 0
            if window is not None:
                mask &= distance < window
            if s_q is not None:
                mask &= s_q.unsqueeze(-1) == s_k.unsqueeze(-2)
            return mask
        """
    },
    4: {
        "attention": """
            wide = torch.promote_types(q.dtype, torch.float32)
            share = q.shape[-2] // k.shape[-2]
            k = k.repeat_interleave(share, dim=-2).to(wide)
            v = v.repeat_interleave(share, dim=-2).to(wide)
            scores = torch.einsum("...thk,...shk->...hts", q.to(wide), k) / q.shape[-1] ** 0.5
            if causal:
                mask = torch.ones(q.shape[-3], k.shape[-3], dtype=torch.bool).tril()
            if mask is not None:
                scores = scores.masked_fill(~mask.unsqueeze(-3), -torch.inf)
            weights = scores.softmax(dim=-1)
            return torch.einsum("...hts,...shk->...thk", weights, v).to(q.dtype)
        """
    },
    5: {
        "forward": """
            gate = self.w1(x)
            return self.w2(gate * torch.sigmoid(gate) * self.w3(x))
        """
    },
    6: {
        "forward(self, x: Tensor, rope: Rope, memory: Memory) -> Tensor:  # x: (..., D)": """
            q, k, v = self.wq(x), self.wk(x), self.wv(x)
            q = q.view(*q.shape[:-1], -1, self.head_dim)
            k = k.view(*k.shape[:-1], -1, self.head_dim)
            v = v.view(*v.shape[:-1], -1, self.head_dim)
            out = memory.attend(rotate(q, rope), rotate(k, rope), v)
            return self.wo(out.flatten(-2))
        """,
        "forward(self, x: Tensor, rope: Rope, memory: Memory) -> Tensor:  # (..., D)": """
            h = x + self.attention(self.attention_norm(x), rope, memory)
            return h + self.feed_forward(self.ffn_norm(h))
        """,
    },
    7: {
        "forward(self, x: Tensor, rope: Rope, cache: Cache)": """
            for layer, memory in zip(self, cache.layers):
                x = layer(x, rope, memory)
            return x
        """,
        "hidden": """
            positions = cache.extend(tokens, sequence_ids)
            x = self.tok_embeddings(tokens)
            x = self.layers(x, rope_phases(positions, self.args, x.dtype), cache)
            return self.norm(x)
        """,
        "logits": """
            logits = self.output(hidden)
            return logits.to(torch.promote_types(logits.dtype, torch.float32))
        """,
        "forward(\n        self, tokens": """
            from mistral_7b.cache import GrowingCache

            if cache is None:
                cache = GrowingCache(self.args.n_layers, self.args.sliding_window)
            cache = cache.writable()
            return self.logits(self.hidden(tokens, cache, sequence_ids)), cache
        """,
        "interleaved": """
            rows = weight.view(heads, 2, -1, *weight.shape[1:])
            return rows.transpose(1, 2).reshape(weight.shape)
        """,
    },
    8: {
        "integer_weights": """
            V, t = logits.shape[-1], modes.temperature.to(logits.dtype)
            exponents = (logits / t).double() - (best[:, None] / t).double()
            weights = (exponents.exp() * 2.0 ** (62 - (V - 1).bit_length())).long()
            if modes.any_filtered:
                rows = weights[modes.filtered]
                least = _cutoff(rows, modes.min_p, modes.top_k, modes.top_p)
                weights[modes.filtered] = rows * (rows >= least)
            return weights
        """,
        "_cutoff": """
            V = weights.shape[-1]
            highest = 2.0 ** (62 - (V - 1).bit_length())
            out = []
            for r, row in enumerate(weights.tolist()):
                p, k, top = float(min_p[r]), int(top_k[r]), float(top_p[r])
                best = sorted(row, reverse=True)
                least = max(best[k - 1] if k else 0, int(p * highest))
                best = [w for w in best if w >= least]
                total, sum_so_far = sum(best), 0
                for w in best:
                    sum_so_far += w
                    if sum_so_far >= top * total:
                        break
                out.append([w])
            return torch.tensor(out)
        """,
        "choose": """
            sums = weights.cumsum(-1)
            total = sums[:, -1]
            target = torch.minimum((u * total).long(), total - 1)
            return (sums <= target[:, None]).sum(-1)
        """,
    },
    9: {
        "extend": """
            T = tokens.shape[-1]
            new = torch.arange(self.length, self.length + T)
            p = new if self.positions is None else torch.cat([self.positions, new])
            self.mask = visible(new, p, self.window)
            self.keep = len(p) if self.window is None else min(len(p), self.window)
            self.positions = p[-self.keep :]
            self.length += T
            return new
        """,
        "attend": """
            if self.entries:
                k = torch.cat([self.entries[0], k], dim=-3)
                v = torch.cat([self.entries[1], v], dim=-3)
            out = attention(q, k, v, self.cache.mask[None])
            keep = self.cache.keep
            self.entries = (k[:, -keep:], v[:, -keep:])
            return out
        """,
    },
    10: {
        "extend": """
            T, n = tokens.shape[1], int(self.length[0])
            new = torch.arange(n, n + T)
            self.old_positions = self.positions.clone()
            self.new_positions = new
            self.slot = new[-self.slots :] % self.slots
            self.positions[:, self.slot] = new[-self.slots :]
            self.length += T
            return new[None]
        """,
        "attend": """
            c = self.cache
            keys = torch.cat([self.k, k], 1)
            values = torch.cat([self.v, v], 1)
            p = torch.cat([c.old_positions[0], c.new_positions])
            out = attention(q, keys, values, visible(c.new_positions, p, c.window)[None])
            self.k[:, c.slot] = k[:, -c.slots :]
            self.v[:, c.slot] = v[:, -c.slots :]
            return out
        """,
    },
    11: {
        "encode_pieces": """
            ids = [tokenizer.bos_id]
            for text in texts:
                ids.extend(tokenizer.encode(text, bos=False))
            return ids
        """,
        "prefill": """
            for start in range(0, len(prompt), chunk):
                hidden = model.hidden(torch.tensor([prompt[start : start + chunk]]), cache)
            return model.logits(hidden[:, -1])
        """,
        "loop": """
            from mistral_7b.sampling.choice import modes_of, uniforms

            logits = prefill(model, prompt, cache, chunk)
            for n in range(params.max_tokens):
                u = torch.tensor([uniforms(params.seed or 0, 0, n, 1)[0]])
                token = int(select_tokens(logits, modes_of([params], logits.shape[-1], logits.device), u))
                yield token
                if token == eos or n == params.max_tokens - 1:
                    break
                logits = prefill(model, [token], cache, chunk)
        """,
    },
    12: {
        "quantize_rows": """
            x = x.float()
            top = x.abs().amax(-1, keepdim=True)
            q = torch.where(top > 0, x * (127 / top), 0.0).round()
            return q, top / 127
        """,
        "forward": """
            blocks = x.reshape(*x.shape[:-1], -1, 32)
            q, s = quantize_rows(blocks)
            out = 0
            for b in range(blocks.shape[-2]):
                whole = (q[..., b, None, :].int() * self.codes[:, b].int()).sum(-1)
                out = out + whole * (self.scale[:, b] * s[..., b, :])
            return out.to(x.dtype)
        """,
    },
    13: {
        "next_key": """
            import hashlib

            return hashlib.sha256(before + b"".join(t.to_bytes(4, "little") for t in tokens)).digest()
        """,
        "take": """
            if self._free:
                page = self._free.pop()
            else:
                page = next(iter(self._idle))
                del self._idle[page]
                del self.page_of[self._key_of.pop(page)]
            self.holders[page] = 1
            return page
        """,
        "share": """
            self._idle.pop(page, None)
            self.holders[page] += 1
            return page
        """,
        "release": """
            for page in pages:
                self.holders[page] -= 1
                if self.holders[page] == 0:
                    if page in self._key_of:
                        self._idle[page] = None
                    else:
                        self._free.append(page)
        """,
        "register": """
            if key not in self.page_of and page not in self._key_of:
                self.page_of[key] = page
                self._key_of[page] = key
        """,
    },
    14: {
        "_build_plan": """
            planned, budget = {}, self.config.max_batch_tokens
            for s in [s for s in self.running if s.decoding and not s.at_token_limit]:
                if s.running:
                    budget -= self._allocate(s, 1, planned, may_preempt)
            for s in [s for s in self.running if not s.decoding]:
                if s.running and budget > 0:
                    budget -= self._allocate(s, self._chunk_size(s, budget, False), planned, may_preempt)
            while self.waiting and budget >= self.page:
                s = self.queues.next(self.queues.heads())
                fit = self._fit(s)
                if fit is None:
                    break
                self._begin(s, *fit)
                budget -= self._allocate(s, self._chunk_size(s, budget, False), planned, may_preempt)
            return list(planned.items())
        """,
        "_chunk_size": """
            n = min(sequence.uncomputed, budget)
            end = sequence.computed + n
            if n < sequence.uncomputed:
                end = end // self.page * self.page
            return max(0, end - sequence.computed)
        """,
        "_find_pages": """
            pool, end = self.pool, sequence.computed + n
            more = max(0, (end + self.page - 1) // self.page - sequence.stop)
            written = range(sequence.computed // self.page, sequence.stop) if n else []
            shared = [i for i in written if pool.holders[sequence.pages[i]] > 1]
            if more + len(shared) > pool.available:
                return False
            for i in shared:
                old = int(sequence.pages[i])
                sequence.pages[i] = pool.copy(old)
                pool.release([old])
            for _ in range(more):
                sequence.append_page(pool.take())
            return True
        """,
    },
}


def written(number: int, bodies: dict[str, str] | None = None) -> str:
    """The learner's file of an exercise: its skeleton with these bodies (default: the plain solution)."""
    e = exercise(number)
    text, todo = skeleton(e), TODO.format(stem=e.stem)
    for name, body in (BODIES[number] if bodies is None else bodies).items():
        start = text.index(f"def {name}" if "(" in name else f"def {name}(")
        at = text.index(todo.splitlines()[0], start)
        end = text.index("raise NotImplementedError\n", at) + len("raise NotImplementedError\n")
        indent = at - text.rindex("\n", 0, at) - 1
        text = (
            text[:at]
            + textwrap.indent(textwrap.dedent(body).strip("\n") + "\n", " " * indent).lstrip(" ")
            + text[end:]
        )
    return text


def mistaken(number: int, right: str, wrong: str) -> str:
    """The plain solution with one line changed."""
    text = written(number)
    assert text.count(right) >= 1, f"the solution of exercise {number} has no {right!r}"
    return text.replace(right, wrong, 1)
