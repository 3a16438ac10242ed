"""One turn of a chat: the only place where history, token counts and Groq meet."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from math import inf

from chat import errors, metrics
from chat.config import Settings
from chat.llm.client import GroqClient
from chat.llm.groq import TokenStream
from chat.messages import ChatRequest, Exchange, Message, flatten
from chat.prompt import fit, split
from chat.reply import Reply
from chat.storage.history import SHARED, History
from chat.tokens import Count, TokenCounts, estimate, estimate_tokens, total

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Turn:
    """What a reply is asked for with, and what is stored at its end."""

    conversation: str | None
    anew: bool  # the client has sent a transcript, which takes the place of what was stored
    before: Sequence[Exchange]
    history: Sequence[Exchange]  # those of them that are sent, behind what is not stored
    new: Sequence[Message]
    new_count: Count


class ChatService:
    """Answer chat requests."""

    def __init__(
        self, settings: Settings, *, history: History, counts: TokenCounts, groq: GroqClient
    ) -> None:
        self._settings, self._history, self._counts = settings, history, counts
        self._groq, self.is_draining = groq, False
        self._system = [Message("system", settings.system_prompt)] * bool(settings.system_prompt)
        self._system_tokens = sum(map(estimate, self._system))
        self._replies: set[Reply] = set()
        self._room = settings.context_tokens  # for a history; less once the model has refused it

    @asynccontextmanager
    async def answer(self, request: ChatRequest, reply: Reply) -> AsyncIterator[TokenStream]:
        """Give the tokens; leaving the context stops Groq; raise `ChatError` if the reply fails."""
        self._admit(reply)
        with metrics.active[reply.stream_type].track_inprogress(), self._counted(reply):
            if reply.is_cancelled:
                raise errors.ReplyCancelled
            turn, reply.task = None, asyncio.current_task()
            reply.deadline = reply.started_at + self._settings.reply_timeout
            try:
                async with asyncio.timeout_at(reply.deadline) as reply.timeout:
                    turn = await self._prepare(request)
                    async with aclosing(self._tokens(turn, reply)) as tokens:
                        yield tokens
            except TimeoutError:
                error = reply.expiry or errors.GroqTimeout()
                if turn and reply.sent and isinstance(error, errors.ReplyCancelled):
                    await self._store(turn, reply)
                raise error from None

    async def drain(self, timeout: float) -> None:
        """Begin no more replies, and end those in progress after `timeout` seconds."""
        self.is_draining = True
        if tasks := [reply.task for reply in self._replies if reply.task]:
            await asyncio.wait(tasks, timeout=timeout)
        if self._replies:
            logger.warning("drain timeout: ending %d replies", len(self._replies))
        for reply in self._replies:
            reply.expire(errors.Draining())

    def _admit(self, reply: Reply) -> None:
        """Make room for a reply, if need be by ending the one unattended for longest."""
        limit, client = self._settings.max_concurrent_per_client, reply.client
        if self.is_draining:
            raise errors.Draining
        if limit and sum(each.client == client for each in self._replies) >= limit:
            raise errors.TooManyReplies(limit)
        if len(self._replies) >= self._settings.max_concurrent:
            oldest = min(self._replies, key=lambda each: each.unattended_since)
            if oldest.unattended_since == inf or not oldest.task:
                raise errors.TooBusy
            self._replies.discard(oldest)
            oldest.task.cancel()

    @contextmanager
    def _counted(self, reply: Reply) -> Iterator[None]:
        """Find out how the reply ends, for the log and the metrics."""
        self._replies.add(reply)
        metrics.requests[reply.stream_type].inc()
        try:
            yield
            reply.outcome = "completed"
            metrics.finish_reasons[reply.finish_reason or "stop"].inc()
        except errors.ReplyCancelled:
            reply.outcome = "cancelled"
            raise
        except (asyncio.CancelledError, errors.ClientDisconnected):
            reply.outcome, reply.error = "cancelled", errors.ClientDisconnected()
            raise
        except errors.ChatError as error:
            reply.error = error
            raise
        except Exception as error:
            logger.exception("unexpected error in a reply")
            reply.error = errors.InternalError()
            raise reply.error from error
        finally:
            self._replies.discard(reply)
            metrics.replies[reply.stream_type, reply.outcome].inc()
            metrics.CHAT_REPLY_DURATION.observe(reply.duration_ms / 1000)
            self._count_tokens(reply)

    def _count_tokens(self, reply: Reply) -> None:
        if reply.ttft_ms is None:
            return  # nothing was generated
        reply.prompt_tokens = reply.usage.prompt_tokens or reply.estimated_tokens
        estimated = estimate_tokens(reply.text) if reply.sent else 0
        reply.completion_tokens = reply.usage.completion_tokens or estimated
        metrics.prompt_tokens.inc(reply.prompt_tokens)
        metrics.completion_tokens.inc(reply.completion_tokens)
        if reply.is_stream:  # a JSON reply comes as a whole
            metrics.CHAT_TIME_TO_FIRST_TOKEN.observe(reply.ttft_ms / 1000)

    async def _prepare(self, request: ChatRequest) -> Turn:
        settings = self._settings
        conversation = request.conversation or (SHARED if settings.shared_conversation else None)
        leading, previous, new = split(request.messages)
        before, is_transcript = list[Exchange](), bool(leading or previous)
        if conversation and not is_transcript:
            before = [*await self._history.read(conversation)]
        counts = iter(await self._counts.count(request.messages[len(leading) :]))
        for number, messages in enumerate(previous):
            tokens, is_exact = total([next(counts) for _ in messages])
            before.append(Exchange(messages, tokens, number, is_exact))
        new_count = total([*counts])
        first = [Exchange(leading, sum(map(estimate, leading)))] * bool(leading)
        needed = self._system_tokens + new_count.tokens + sum(each.tokens for each in first)
        room = min(settings.context_tokens - settings.max_tokens, max(needed, self._room))
        history = fit(before, fixed=needed, room=room, step=max(1, settings.max_exchanges // 4))
        anew = is_transcript and conversation != SHARED
        return Turn(conversation, anew, before, [*first, *history], new, new_count)

    async def _tokens(self, turn: Turn, reply: Reply) -> TokenStream:
        refused = 0  # the tokens of the smallest prompt that was
        while not reply.is_whole:
            messages = [*self._system, *flatten(turn.history), *turn.new]
            known = self._system_tokens + sum(exchange.tokens for exchange in turn.history)
            reply.estimated_tokens = known + turn.new_count.tokens
            try:
                async with aclosing(self._groq.stream(messages, reply)) as tokens:
                    async for some in tokens:
                        yield some
                        reply.sent += some  # only what the transport has taken
                reply.is_whole = True
            except errors.GroqRefused as error:
                if not error.is_too_large or reply.ttft_ms is not None:
                    raise
                if not turn.history:
                    raise errors.BadRequest("the message is too long for the model") from error
                size = sum(len(each.content.encode()) for each in messages)
                # An estimate may be far too low for odd text, which must not cost others room.
                refused = max(reply.estimated_tokens, size // 4)
                turn.history = turn.history[(len(turn.history) + 1) // 2 :]
                metrics.GROQ_RETRIES.inc()
        if refused and reply.model == self._settings.model:
            self._room = min(self._room, refused * 3 // 4)
        if reply.timeout:
            reply.timeout.reschedule(None)  # a stored reply does not end as a timeout
        await self._store(turn, reply)

    async def _store(self, turn: Turn, reply: Reply) -> None:
        """Store the exchange before the client learns of the end: its next request may need it."""
        answer = Message("assistant", reply.text)
        tokens, is_exact = self._learn(turn, reply, answer)
        number = turn.before[-1].number + 1 if turn.before else 0
        exchange = Exchange((*turn.new, answer), tokens, number, is_exact)
        if turn.conversation:
            exchanges = [*turn.before, exchange] if turn.anew else [exchange]
            await self._history.store(turn.conversation, exchanges, turn.anew)

    def _learn(self, turn: Turn, reply: Reply, answer: Message) -> Count:
        """Return the count of the exchange, and remember what Groq's report says about it."""
        asked, answered, usage = turn.new_count, None, reply.usage
        # Another model's counts are not this one's.
        if reply.is_whole and reply.model == self._settings.model:
            answered = self._counts.learn(answer, usage.reply_tokens)
            is_rest_known = all(exchange.is_exact for exchange in turn.history)
            if len(turn.new) == 1 and is_rest_known and not asked.is_exact:
                tokens = (usage.prompt_tokens or 0) - reply.estimated_tokens + asked.tokens
                asked = self._counts.learn(turn.new[0], tokens) or asked
        return total([asked, answered or Count(estimate(answer), False)])
