"""Samples -> token ids, and which of them are trained: exactly the tokens that inference feeds and generates.

The prompt of an answer is what `Tokenizer.encode_chat` makes of the messages before it; the answer is what follows
that prompt in `Tokenizer.encode_history`, up to and with the token that ends it:

    prompt   <s>[INST] Hi[/INST]                 not trained
    answer                       Hello</s>       trained

Several answers of a conversation stand in one document as long as each continues its own prompt there:

    <s>[INST] Hi[/INST] Hello</s>[INST] More?[/INST] Yes</s>

Where a template writes a history differently (Mistral's v3 moves the system text and the tools to the last user's
message, others drop reasoning), an answer that does not gets a document of its own, which ends with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..errors import TrainingError
from ..text.tokenizer import Tokenizer
from .forms import Chat, Completion, Document, Judged, Preference, Row, Sample, Task
from .messages import Message


class Encoded(NamedTuple):
    """One document of T tokens.

    ids      (T,) int32, beginning as a prompt of inference does
    trained  (T,) bool: whether predicting ids[t] from ids[:t] has a loss; never the first
    """

    ids: np.ndarray
    trained: np.ndarray


class Pair(NamedTuple):
    """Two answers to one prompt; trained are the tokens of the answers."""

    chosen: Encoded
    rejected: Encoded


class Thumb(NamedTuple):
    """An answer, and whether it is a good one; trained are the tokens of the answer."""

    answer: Encoded
    good: bool


class Prompt(NamedTuple):
    """A prompt to answer, (T,) int32, and the row that it came from, for the reward function."""

    ids: np.ndarray
    row: Row


Item = Encoded | Pair | Thumb | Prompt


class Encoder:
    """Encodes samples into items of at most `seq_len` tokens a document.

    Raises TrainingError, or TokenizerError of the tokenizer, for a sample that cannot be trained on as it is.
    """

    def __init__(self, tokenizer: Tokenizer, seq_len: int) -> None:
        if seq_len < 2:
            raise TrainingError(f"seq_len must be at least 2, not {seq_len}", field="seq_len")
        self.tokenizer, self.seq_len = tokenizer, seq_len

    def encode(self, sample: Sample) -> list[Item]:
        """Return the items of a sample: several for a long text, and for a chat that is no single document."""
        if isinstance(sample, Document):
            return list(self._pieces(sample.text))
        if isinstance(sample, Preference):
            return [Pair(self._single(sample.chosen), self._single(sample.rejected))]
        if isinstance(sample, Judged):
            return [Thumb(self._single(sample.answer), sample.good)]
        if isinstance(sample, Task):
            return [Prompt(self._prompt(sample.prompt), sample.row)]
        return list(self._answers(sample))

    def _pieces(self, text: str) -> list[Encoded]:
        """Return a plain text in pieces of `seq_len`. Each token but the first is a target of one piece.

        A piece begins with BOS, if texts do, and the last token of the piece before, as context.
        """
        ids = self.tokenizer.encode(text, eos=True)
        start = 1 if ids[0] == self.tokenizer.bos_id and self.tokenizer.vocabulary.adds_bos else 0
        if len(ids) <= self.seq_len:
            return [_document(ids, [(1, len(ids))])]
        if start + 2 > self.seq_len:
            raise TrainingError(f"seq_len {self.seq_len} is too short for pieces of a text", field="seq_len")
        pieces = [_document(ids[: self.seq_len], [(1, self.seq_len)])]
        for first in range(self.seq_len, len(ids), self.seq_len - start - 1):
            piece = ids[:start] + ids[first - 1 : first - 1 + self.seq_len - start]
            pieces.append(_document(piece, [(start + 1, len(piece))]))
        return pieces

    def _answers(self, sample: Completion | Chat) -> list[Encoded]:
        documents = self._completion(sample) if isinstance(sample, Completion) else self._chat(sample)
        for document in documents:
            self._check_length(len(document.ids))
        return documents

    def _single(self, sample: Completion | Chat) -> Encoded:
        """Return the one document of answers that are compared or judged."""
        documents = self._answers(sample)
        if len(documents) > 1:
            raise TrainingError(
                "this template writes earlier answers differently in a history: judge one answer, the last",
                field="messages",
            )
        return documents[0]

    def _prompt(self, prompt: str | Chat) -> np.ndarray:
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        else:
            ids = self.tokenizer.encode_chat(prompt.messages, prompt.tools)
        self._check_length(len(ids) + 1)  # and one token of an answer
        return np.asarray(ids, np.int32)

    def _check_length(self, length: int) -> None:
        if length > self.seq_len:
            raise TrainingError(
                f"has {length:,} tokens, and seq_len is {self.seq_len:,}: raise seq_len, or shorten it",
                field="seq_len",
            )

    def _completion(self, sample: Completion) -> list[Encoded]:
        prompt = self.tokenizer.encode(sample.prompt)
        whole = self.tokenizer.encode(sample.prompt + sample.completion, eos=True)
        if (ids := self._continued(prompt, whole)) is None:
            raise TrainingError("completion begins within a token of the prompt", field="completion")
        return [_document(ids, [(len(prompt), len(ids))])]

    def _chat(self, chat: Chat) -> list[Encoded]:
        """Return the fewest documents in which every answer continues the prompt that inference gives it."""
        documents: list[tuple[list[int], list[tuple[int, int]]]] = []
        for i in reversed(chat.answers):
            prompt = self.tokenizer.encode_chat(chat.messages[:i], chat.tools)
            whole = self._answered(chat, i, prompt)
            ids = prompt + self._answer(chat.messages[i], whole, len(prompt), f"messages[{i}]")
            if not documents or documents[-1][0][: len(ids)] != ids:
                documents.append((ids, []))
            documents[-1][1].append((len(prompt), len(ids)))
        return [_document(ids, spans) for ids, spans in reversed(documents)]

    def _answer(self, message: Message, whole: list[int], start: int, name: str) -> list[int]:
        """Return the answer from `start` on, with the token that ends it. TrainingError if some is not written."""
        stops = self.tokenizer.stop_ids
        end = next((t + 1 for t in range(start, len(whole)) if whole[t] in stops), len(whole))
        answer = whole[start:end]
        if not answer or answer[0] in stops:
            raise TrainingError(f"{name}: the chat template writes nothing of this answer", field=name)
        if calls := message.get("tool_calls"):
            written = self.tokenizer.decode(answer)
            content = message.get("content")
            names = [call["function"]["name"] for call in calls]
            said = content.strip() if isinstance(content, str) else ""
            if lost := next((part for part in (*names, said) if part not in written), None):
                raise TrainingError(
                    f"{name}: the chat template drops {lost!r:.60} of an answer with tool calls", field=name
                )
        return answer

    def _answered(self, chat: Chat, i: int, prompt: list[int]) -> list[int]:
        """Return a conversation up to message `i`, an answer, as it continues its prompt.

        Some templates write the end of that prompt differently once an answer follows. The answer is then what
        stands behind the last beginning of an assistant's message. TrainingError if there is none.
        """
        whole = self.tokenizer.encode_history(chat.messages[: i + 1], chat.tools)
        if (continued := self._continued(prompt, whole)) is not None:
            return continued
        before = self.tokenizer.encode_history(chat.messages[:i], chat.tools)
        begun = prompt[len(before) :] if prompt[: len(before)] == before else []
        n = len(begun)
        if not self.tokenizer.vocabulary.markup.isdisjoint(begun):  # else a message could contain it
            for start in range(len(whole) - n, -1, -1):
                if whole[start : start + n] == begun:
                    return [*prompt, *whole[start + n :]]
        raise TrainingError(
            f"messages[{i}]: in a history the chat template writes another beginning of this answer than the one "
            "it gives a model to continue, or that beginning and the answer's first blanks are one token",
            field=f"messages[{i}]",
        )

    def _continued(self, prompt: list[int], whole: list[int]) -> list[int] | None:
        """Return `whole` as it continues `prompt`; None if it does not.

        A tokenizer may merge the end of a prompt with the beginning of an answer. Inference, which is given the
        prompt, generates the rest of such a token; so the rest is encoded by itself.
        """
        if whole[: len(prompt)] == prompt:
            return whole
        before, spelled, n = self._spelled(prompt), b"", 0
        while len(spelled) < len(before) and n < len(whole):
            spelled += self._spelled([whole[n]])
            n += 1
        rest = self._encoded_rest(spelled[len(before) :]) if spelled.startswith(before) else None
        return None if rest is None else [*prompt, *rest, *whole[n:]]

    def _encoded_rest(self, text: bytes) -> list[int] | None:
        """Return tokens that spell `text` within a text, without a space before it; None if there are none."""
        if not text:
            return []
        for lead in ("", "\n", "1"):  # a newline may merge with the first or the second, a digit with none
            try:
                before = self.tokenizer.vocabulary.encode(lead)
                ids = self.tokenizer.vocabulary.encode(lead + text.decode())
            except UnicodeDecodeError:
                return None
            if ids[: len(before)] == before and self._spelled(ids[len(before) :]) == text:
                return ids[len(before) :]
        return None

    def _spelled(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of tokens, control tokens by their names."""
        t = self.tokenizer
        return b"".join(t.piece(i).encode() if t.is_control(i) else t.piece_bytes(i) for i in ids)


def _document(ids: list[int], spans: Sequence[tuple[int, int]]) -> Encoded:
    """Return a document whose tokens in these ranges are trained, but for the first, which nothing predicts."""
    trained = np.zeros(len(ids), bool)
    for start, end in spans:
        trained[max(start, 1) : end] = True
    return Encoded(np.asarray(ids, np.int32), trained)
