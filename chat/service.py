"""
One turn of a chat, the same for every transport: the only place where history, tokens and Groq
meet.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from chat import metrics
from chat.config import Settings
from chat.context import fit, without_overlap
from chat.errors import CallerLeft, ChatError, ConversationNotFound, InternalError
from chat.groq import Groq
from chat.history import SHARED, Exchange, History, flatten
from chat.messages import ChatRequest, Message, Usage
from chat.reply import Outcome, Reply, StreamType
from chat.tokens import Count, TokenCounts, estimate, estimate_tokens

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Turn:
    """What a reply is asked for with."""

    conversation: str | None
    new: list[Message]
    """The messages that the history does not have yet."""
    preceding: int
    """How many stored exchanges go before them."""
    messages: list[Message]
    """Those exchanges' messages and the new ones."""
    counts: list[Count]


class ChatService:
    """Answer chat requests, each with a `Reply` that fills while it is read."""

    def __init__(
        self, settings: Settings, *, history: History, counts: TokenCounts, groq: Groq
    ) -> None:
        self._settings = settings
        self._history = history
        self._counts = counts
        self._groq = groq
        self._system: list[Message] = []
        self._system_tokens = 0
        if settings.system_prompt:
            self._system = [Message("system", settings.system_prompt)]
            self._system_tokens = estimate(self._system[0])
        self._tasks: set[asyncio.Task[None]] = set()

    def reply_to(self, request: ChatRequest, stream_type: StreamType) -> Reply:
        """Begin the reply to a request; who takes it ends it with `stop` or `abandon`."""
        reply = Reply(stream_type, self._settings.model)
        task = asyncio.create_task(self._run(request, reply))
        # Not at once: a task that is cancelled before its first step never gets to end its reply.
        reply.begin(lambda: task.get_loop().call_soon(task.cancel))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return reply

    async def messages_of(self, conversation: str) -> list[Message]:
        """
        Return the messages of a caller's conversation.

        Raises:
            ConversationNotFound: nothing is stored under that id.
        """
        if exchanges := await self._history.read(conversation):
            return flatten(exchanges)
        raise ConversationNotFound

    async def forget(self, conversation: str) -> None:
        """Forget a caller's conversation, whether or not there is one."""
        await self._history.forget(conversation)

    async def count_conversations(self) -> int:
        return await self._history.count()

    async def aclose(self) -> None:
        """End all replies that still run."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, request: ChatRequest, reply: Reply) -> None:
        metrics.CHAT_REQUESTS.labels(reply.stream_type).inc()
        with metrics.CHAT_REPLIES_ACTIVE.labels(reply.stream_type).track_inprogress():
            outcome: Outcome = "failed"
            error: ChatError | None = None
            turn = None
            try:
                turn = await self._prepare(request)
                await self._ask(turn, reply)
                outcome = "completed"
            except asyncio.CancelledError:
                outcome = "cancelled"
                reply.keep_what_was_sent()
                error = None if reply.was_stopped else CallerLeft()
            except ChatError as raised:
                error = raised
            except Exception:
                logger.exception("a reply failed by a fault of ours")
                error = InternalError()
            try:
                await self._store(turn, reply, outcome)
            finally:
                reply.end(outcome, error)
            self._settle(turn, reply, outcome)

    async def _prepare(self, request: ChatRequest) -> Turn:
        conversation = request.conversation
        if conversation is None and self._settings.shared_conversation:
            conversation = SHARED
        history = await self._history.read(conversation) if conversation else ()
        is_full = len(history) >= self._settings.max_exchanges
        new = without_overlap(history, request.messages, is_full=is_full)
        counts = await self._counts.count([*flatten(history), *new])
        costs = _costs(history, counts)
        preceding = fit(
            history,
            costs,
            fixed=self._system_tokens + _total(counts[len(counts) - len(new) :]),
            max_tokens=self._settings.max_tokens,
            context_tokens=self._settings.context_tokens,
        )
        messages = [*flatten(history[len(history) - preceding :]), *new]
        return Turn(conversation, new, preceding, messages, counts[len(counts) - len(messages) :])

    async def _ask(self, turn: Turn, reply: Reply) -> None:
        reply.prompt_tokens = self._system_tokens + _total(turn.counts)
        ask = self._groq.complete if reply.stream_type == "json" else self._groq.stream
        await ask([*self._system, *turn.messages], reply)

    async def _store(self, turn: Turn | None, reply: Reply, outcome: Outcome) -> None:
        """Store the exchange before the caller learns of the end: the next request may need it."""
        is_stopped = outcome == "cancelled" and reply.was_stopped and reply.has_tokens
        if turn and turn.conversation and (outcome == "completed" or is_stopped):
            exchange = Exchange((*turn.new, Message("assistant", reply.text)), turn.preceding)
            await self._history.append(turn.conversation, exchange)
        if reply.is_accepted:
            _count_tokens(reply)

    def _settle(self, turn: Turn | None, reply: Reply, outcome: Outcome) -> None:
        """Count and learn, off the caller's path."""
        _count_reply(reply, outcome)
        if turn and outcome == "completed" and reply.usage:
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
