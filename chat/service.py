"""
One turn of a chat, the same for every transport: the only place where history, tokens and Groq
meet.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass

from chat import metrics
from chat.config import Settings
from chat.context import fit, newest, split, without_overlap
from chat.errors import (
    CallerLeft,
    ChatError,
    ConversationNotFound,
    GroqRefused,
    GroqTimeout,
    InternalError,
    TooBusy,
    TooManyReplies,
)
from chat.history import SHARED, Exchange, History, flatten
from chat.messages import MAX_MESSAGES, ChatRequest, Message, Usage
from chat.places import Places
from chat.reply import Outcome, Reply, StreamType
from chat.tokens import Count, TokenCounts, estimate, estimate_tokens
from chat.upstream import Upstream

logger = logging.getLogger(__name__)


CONSIDERED_MESSAGES = 2 * MAX_MESSAGES
"""Earlier messages that are looked at in a turn: each takes some microseconds of everybody's."""


@dataclass(slots=True)
class Turn:
    """What a reply is asked for with."""

    conversation: str | None
    history: Sequence[Exchange]
    """The exchanges that go along, stored or told of by the caller."""
    new: list[Message]
    """The messages to reply to."""
    counts: list[Count]
    """Of the messages of both."""
    told: Sequence[Exchange]
    """The exchanges that the caller has told of and that are not stored yet."""

    @property
    def messages(self) -> list[Message]:
        return [*flatten(self.history), *self.new]

    def keep_newest(self, count: int) -> None:
        """Leave out all but so many of the exchanges that go along."""
        self.history = self.history[len(self.history) - count :]
        self.counts = self.counts[len(self.counts) - len(self.messages) :]


class ChatService:
    """Answer chat requests, each with a `Reply` that fills while it is read."""

    def __init__(
        self, settings: Settings, *, history: History, counts: TokenCounts, upstream: Upstream
    ) -> None:
        self._settings = settings
        self._history = history
        self._counts = counts
        self._upstream = upstream
        self._system: list[Message] = []
        self._system_tokens = 0
        if settings.system_prompt:
            self._system = [Message("system", settings.system_prompt)]
            self._system_tokens = estimate(self._system[0])
        self._replies: dict[asyncio.Task[None], Reply] = {}
        self._refusal: Callable[[], ChatError] | None = None
        self._places = Places(settings.max_concurrent_per_client, TooManyReplies)

    def reply_to(self, request: ChatRequest, stream_type: StreamType, client: str) -> Reply:
        """
        Begin the reply to a request; who takes it ends it with `stop` or `abandon`.

        Raises:
            TooBusy, TooManyReplies: too many run already, of all clients or of this one.
            ChatError: what `refuse` was given.
        """
        if self._refusal:
            raise self._refusal()
        room = ExitStack()
        room.enter_context(self._room(client))
        reply = Reply(stream_type, self._settings.model, self._settings.reply_timeout)
        task = asyncio.create_task(self._run(request, reply))
        reply.begin(task.cancel)
        self._replies[task] = reply
        room.callback(self._replies.pop, task)
        task.add_done_callback(lambda _: room.close())
        return reply

    @contextmanager
    def _room(self, client: str) -> Iterator[None]:
        if self._places.taken >= self._settings.max_concurrent:
            raise TooBusy
        with self._places.taken_by(client):
            yield

    @asynccontextmanager
    async def reading(self, conversation: str, client: str) -> AsyncIterator[list[Message]]:
        """
        Give the messages of a caller's conversation; to read them takes the room of a reply, since
        they may be as many bytes.

        Raises:
            ConversationNotFound: nothing is stored under that id.
            TooBusy, TooManyReplies: too many run already, of all clients or of this one.
        """
        with self._room(client):
            exchanges = await self._history.read(conversation)
            if not exchanges:
                raise ConversationNotFound
            yield flatten(exchanges)

    async def forget(self, conversation: str) -> None:
        """Forget a caller's conversation, whether or not there is one."""
        await self._history.forget(conversation)

    async def count_conversations(self) -> int:
        return await self._history.count()

    def refuse(self, error: Callable[[], ChatError]) -> None:
        """Begin no more replies."""
        self._refusal = error

    async def wait_idle(self, timeout: float) -> bool:
        """
        Wait for the replies that run, and until what they said is stored.

        Args:
            timeout: seconds to wait at most.

        Returns:
            Whether the replies ended in time.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                if self._replies:
                    await asyncio.wait(self._replies)
                await self._history.flush()
        return not self._replies

    def interrupt(self, error: Callable[[], ChatError]) -> None:
        """End all replies that run, for a reason of ours."""
        for reply in self._replies.values():
            reply.interrupt(error())

    async def aclose(self) -> None:
        """End all replies that still run."""
        running = list(self._replies)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _run(self, request: ChatRequest, reply: Reply) -> None:
        metrics.CHAT_REQUESTS.labels(reply.stream_type).inc()
        with metrics.CHAT_REPLIES_ACTIVE.labels(reply.stream_type).track_inprogress():
            outcome: Outcome = "failed"
            error: ChatError | None = None
            turn = None
            try:
                async with asyncio.timeout_at(reply.deadline):
                    turn = await self._prepare(request)
                    await self._ask(turn, reply)
                outcome = "completed"
            except TimeoutError:
                error = GroqTimeout()
            except asyncio.CancelledError:
                reply.keep_what_was_sent()
                error = reply.interruption
                if error is None:
                    outcome = "cancelled"
                    error = None if reply.was_stopped else CallerLeft()
            except ChatError as raised:
                error = raised
            except Exception:
                logger.exception("a reply failed by a fault of ours")
                error = InternalError()
            reply.settle()
            try:
                await self._store(turn, reply, outcome)
            finally:
                reply.end(outcome, error)
            self._count_and_learn(turn, reply, outcome)

    async def _prepare(self, request: ChatRequest) -> Turn:
        conversation = request.conversation
        if conversation is None and self._settings.shared_conversation:
            conversation = SHARED
        stored = await self._history.read(conversation) if conversation else ()
        is_full = len(stored) >= self._settings.max_exchanges
        told, new = split(without_overlap(stored, request.messages, is_full=is_full), stored)
        earlier = [*stored, *told]
        if conversation:
            earlier = earlier[-self._settings.max_exchanges :]
        history = newest(earlier, CONSIDERED_MESSAGES)
        counts = await self._counts.count([*flatten(history), *new])
        costs = _costs(history, counts)
        kept = fit(
            history,
            costs,
            fixed=self._system_tokens + _total(counts[len(counts) - len(new) :]),
            max_tokens=self._settings.max_tokens,
            context_tokens=self._settings.context_tokens,
        )
        turn = Turn(conversation, history, new, counts, told)
        turn.keep_newest(kept)
        return turn

    async def _ask(self, turn: Turn, reply: Reply) -> None:
        """Ask; where that is too much for the model, once more with half of the history."""
        try:
            await self._ask_once(turn, reply)
        except GroqRefused as error:
            if not (error.is_too_large and turn.history):
                raise
            metrics.GROQ_RETRIES.inc()
            turn.keep_newest(len(turn.history) // 2)
            await self._ask_once(turn, reply)

    async def _ask_once(self, turn: Turn, reply: Reply) -> None:
        reply.prompt_tokens = self._system_tokens + _total(turn.counts)
        await self._upstream.ask([*self._system, *turn.messages], reply)

    async def _store(self, turn: Turn | None, reply: Reply, outcome: Outcome) -> None:
        """Store the exchange before the caller learns of the end: the next request may need it."""
        is_stopped = outcome == "cancelled" and reply.was_stopped and reply.has_tokens
        if turn and turn.conversation and (outcome == "completed" or is_stopped):
            exchange = Exchange((*turn.new, Message("assistant", reply.text)), len(turn.history))
            await self._history.append(turn.conversation, *turn.told, exchange)
        if reply.is_accepted:
            _count_tokens(reply)

    def _count_and_learn(self, turn: Turn | None, reply: Reply, outcome: Outcome) -> None:
        """Count and learn, off the caller's path."""
        _count_reply(reply, outcome)
        # Another model's counts are not this one's.
        is_ours = reply.model == self._settings.model
        if turn and outcome == "completed" and reply.usage and is_ours:
            self._learn(turn, reply, reply.usage)

    def _learn(self, turn: Turn, reply: Reply, usage: Usage) -> None:
        self._counts.learn(
            turn.messages,
            turn.counts,
            prompt_tokens=(usage.prompt_tokens or 0) - self._system_tokens,
            reply=Message("assistant", reply.text),
            reply_tokens=usage.reply_tokens,
        )


def _costs(history: Sequence[Exchange], counts: Sequence[Count]) -> list[int]:
    tokens = iter(counts)
    return [sum(next(tokens).tokens for _ in each.messages) for each in history]


def _total(counts: Sequence[Count]) -> int:
    return sum(count.tokens for count in counts)


def _count_tokens(reply: Reply) -> None:
    usage = reply.usage or Usage()
    reply.prompt_tokens = usage.prompt_tokens or reply.prompt_tokens or 0
    reply.completion_tokens = usage.completion_tokens or estimate_tokens(reply.text)
    metrics.CHAT_TOKENS.labels("prompt").inc(reply.prompt_tokens)
    metrics.CHAT_TOKENS.labels("completion").inc(reply.completion_tokens)


def _count_reply(reply: Reply, outcome: Outcome) -> None:
    metrics.CHAT_REPLIES.labels(reply.stream_type, outcome).inc()
    metrics.CHAT_REPLY_DURATION.observe(reply.duration)
    # A JSON reply comes as a whole: its first token would say nothing of the stream's.
    if reply.time_to_first_token is not None and reply.stream_type != "json":
        metrics.CHAT_TIME_TO_FIRST_TOKEN.observe(reply.time_to_first_token)
