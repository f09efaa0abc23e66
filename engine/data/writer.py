"""The LLM that writes: an OpenAI-compatible endpoint, or a model on this machine.

Every reply is kept on disk under the hash of its request, so that a second run, or one that was
killed, costs nothing for what is there. Keys come from the environment and are written nowhere.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from unteach.engine.data.rejects import Rejects
from unteach.engine.data.replies import ReplyError, Shape, parse_reply
from unteach.engine.data.settings import WriterConfig
from unteach.engine.data.tokens import Turn
from unteach.engine.errors import InputError
from unteach.engine.files import write_atomic

BUSY = {408, 409, 425, 429, 500, 502, 503, 504}
LONGEST_WAIT_S = 60.0
REPAIR = (
    "Your reply could not be read: {fault}. Reply again in the form that was asked for, with "
    "nothing around it."
)
Chat = tuple[Turn, ...]
S = TypeVar("S", bound=Shape)
T = TypeVar("T")


class BudgetSpent(Exception):
    """No call or token of the budget is left; what was written so far is kept."""


@dataclass(frozen=True)
class Reply:
    """What came back, and what it cost in tokens."""

    text: str
    tokens: int


class Answerer(Protocol):
    """One chat, one reply."""

    def __call__(self, chat: Chat) -> Reply: ...


class Writer:
    """Asks, keeps, counts, and stops at the budget.

    Attributes:
        spent: calls and tokens of this run; `kept` counts replies that were there already.
    """

    def __init__(self, settings: WriterConfig, folder: Path, answer: Answerer) -> None:
        self.settings = settings
        self.folder = folder
        self.spent: Counter[str] = Counter()
        self._answer = answer
        self._lock = threading.Lock()
        self._turns = [threading.Lock() for _ in range(1024)]

    def ask(self, chat: Chat) -> str:
        """The reply to a chat, from disk where it is there.

        Raises:
            BudgetSpent: it is not there, and the budget has no call or token left.
        """
        path = self._path(chat)
        # Two threads that ask the same wait for one reply.
        with self._turns[int(path.stem[:8], 16) % len(self._turns)]:
            return self._kept_or_asked(chat, path)

    def _kept_or_asked(self, chat: Chat, path: Path) -> str:
        if (kept := _read_kept(path)) is not None:
            with self._lock:
                self.spent["kept"] += 1
            return kept
        self._take_call()
        reply = self._answer(chat)
        # JSON can spell lone surrogates, which nothing can send on or write.
        text = reply.text.encode("utf-8", "replace").decode("utf-8")
        with self._lock:
            self.spent["tokens"] += reply.tokens
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"model": self.settings.model, "chat": chat, "reply": text}
        write_atomic(path, json.dumps(content, ensure_ascii=False).encode())
        return text

    def fill(self, chat: Chat, shape: type[S], rejects: Rejects) -> S | None:
        """A reply of the asked shape, after one attempt at repair; None where that fails too."""
        text = self.ask(chat)
        try:
            value, cleaned = parse_reply(text, shape)
        except ReplyError as error:
            repair = (("assistant", text), ("user", REPAIR.format(fault=error)))
            try:
                value, cleaned = parse_reply(self.ask((*chat, *repair)), shape)
            except ReplyError as again:
                rejects.add("reply that is no JSON of the shape", f"{again}: {text}")
                return None
            with self._lock:
                self.spent["repaired"] += 1
        if cleaned:
            with self._lock:
                self.spent["cleaned"] += 1
        return value

    def map(self, work: Callable[[T], Any], items: Iterable[T]) -> Iterator[tuple[T, Any]]:
        """`work` on every item, many at once, results in order; holds few at a time.

        Ends early, without an error, when the budget is spent.
        """
        window = 2 * self.settings.concurrency
        waiting: deque[tuple[T, Future[Any]]] = deque()
        source, ended = iter(items), False
        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            try:
                while True:
                    while not ended and len(waiting) < window:
                        try:
                            item = next(source)
                        except StopIteration:
                            ended = True
                        else:
                            waiting.append((item, pool.submit(work, item)))
                    if not waiting:
                        return
                    item, future = waiting.popleft()
                    yield item, future.result()
            except BudgetSpent:
                self.spent["stopped"] = 1
            finally:
                for _, future in waiting:
                    future.cancel()

    def _take_call(self) -> None:
        with self._lock:
            calls, tokens = self.settings.max_calls, self.settings.max_tokens
            if calls is not None and self.spent["calls"] >= calls:
                raise BudgetSpent
            if tokens is not None and self.spent["tokens"] >= tokens:
                raise BudgetSpent
            self.spent["calls"] += 1

    def _path(self, chat: Chat) -> Path:
        chosen = self.settings
        request = [chosen.kind, chosen.model, chosen.temperature, chosen.max_new_tokens, chat]
        name = hashlib.sha256(json.dumps(request, ensure_ascii=True).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.json"


class Endpoint:
    """Chat completions over HTTP, with waits where the server is busy or silent."""

    def __init__(self, settings: WriterConfig) -> None:
        from huggingface_hub import InferenceClient

        self.settings = settings
        # Without a key of ours the client would send the user's own hub token to this server.
        key = os.environ.get(settings.key_variable) or "none"
        self._client = InferenceClient(
            base_url=settings.url, api_key=key, timeout=settings.timeout_s
        )
        self._pace = _Pace(settings.requests_per_minute)
        self._random = random.Random(0)

    def __call__(self, chat: Chat) -> Reply:
        """One reply, after as many tries as the settings allow.

        Raises:
            InputError: the server refuses the request, or stays busy or silent.
        """
        for attempt in range(self.settings.retries + 1):
            self._pace.wait()
            try:
                return self._post(chat)
            except Exception as error:  # the client raises its transport's own kinds
                status, after = _status(error)
                if status is not None and status not in BUSY:
                    raise InputError(
                        f"The writer at {self.settings.url} says {status}: check writer.url, "
                        f"writer.model and the key in {self.settings.key_variable}."
                    ) from error
                fault = f"says {status}" if status else f"does not answer ({_first_line(error)})"
            if attempt < self.settings.retries:
                wait = min(LONGEST_WAIT_S, self.settings.backoff_s * 2**attempt)
                # A spread keeps threads that failed together from coming back together.
                wait *= 0.5 + self._random.random() / 2
                time.sleep(min(LONGEST_WAIT_S, after) if after is not None else wait)
        raise InputError(
            f"The writer at {self.settings.url} {fault}, {self.settings.retries + 1} times over: "
            "what it wrote is kept, and the same command goes on once it answers."
        )

    def _post(self, chat: Chat) -> Reply:
        output = self._client.chat_completion(
            [{"role": role, "content": content} for role, content in chat],
            model=self.settings.model,
            max_tokens=self.settings.max_new_tokens,
            temperature=self.settings.temperature,
            seed=0,
        )
        text = output.choices[0].message.content or ""
        usage = output.usage
        sent = sum(len(content) for _, content in chat)
        # About four characters a token, where the server does not say.
        tokens = usage.total_tokens if usage else (sent + len(text)) // 4
        return Reply(text, int(tokens))


class _Pace:
    """At most so many starts a minute, evenly spaced."""

    def __init__(self, per_minute: float | None) -> None:
        self._gap_s = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        if not self._gap_s:
            return
        with self._lock:
            at = max(time.monotonic(), self._next)
            self._next = at + self._gap_s
        time.sleep(max(0.0, at - time.monotonic()))


class LocalModel:
    """Greedy replies of a model on this machine, one at a time."""

    def __init__(self, settings: WriterConfig, folder: Path, device: torch.device | None) -> None:
        from unteach.engine.config import ModelConfig
        from unteach.engine.model import load_model, load_tokenizer, resolve_model

        self.settings = settings
        config = ModelConfig(path=settings.model)
        path = resolve_model(settings.model, folder)
        self._tokenizer = load_tokenizer(path, config)
        self._model = load_model(path, config, device=device)
        self._lock = threading.Lock()

    def __call__(self, chat: Chat) -> Reply:
        """One reply; a chat that is too long for the model is an empty one."""
        from unteach.engine.data.tokens import context_tokens, end_token
        from unteach.engine.inference import greedy
        from unteach.engine.model import head_of

        system = chat[0][1] if chat[0][0] == "system" else None
        turns = chat[1:-1] if system is not None else chat[:-1]
        tokens = context_tokens(self._tokenizer, chat[-1][1], system=system, turns=turns)
        room = int(getattr(self._model.config, "max_position_embeddings", 2**31)) - len(tokens)
        new = min(self.settings.max_new_tokens, room)
        if new < 1:
            return Reply("", len(tokens))
        with self._lock:
            (ids,) = greedy(
                self._model,
                [tokens],
                end=end_token(self._tokenizer),
                vocab=head_of(self._model, self._tokenizer).vocab,
                max_new_tokens=new,
                batch_size=1,
            )
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        return Reply(str(text), len(tokens) + len(ids))


def open_writer(
    settings: WriterConfig, folder: Path, device: torch.device | None = None
) -> Writer | None:
    """The writer that the settings name, its replies under `folder`; None where nobody writes.

    Args:
        device: of a local model.
    """
    if settings.kind == "none":
        return None
    if settings.kind == "endpoint":
        return Writer(settings, folder / "replies", Endpoint(settings))
    # One model answers one chat at a time; more threads would only wait.
    alone = settings.model_copy(update={"concurrency": 1})
    return Writer(alone, folder / "replies", LocalModel(alone, folder, device))


def _read_kept(path: Path) -> str | None:
    try:
        reply = json.loads(path.read_text(encoding="utf-8"))["reply"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return reply if isinstance(reply, str) else None


def _status(error: Exception) -> tuple[int | None, float | None]:
    """HTTP status and Retry-After in seconds, where the error is a reply of the server."""
    response = getattr(error, "response", None)
    if response is None:
        return None, None
    try:
        after = float(response.headers.get("retry-after", ""))
    except ValueError:
        after = math.nan
    # A date, or no time that could be waited: the wait that doubles takes its place.
    return int(response.status_code), after if 0 <= after < math.inf else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
