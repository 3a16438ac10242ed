"""
Redis, asked for answers that come soon or not at all.

Commands that come while others run are sent together: under load, one round trip serves many chats.
A place that does not answer in time is left out until a probe in the background has found that it
does again; what is asked with more patience has a lane of its own, which that does not touch.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Literal

from chat import metrics
from chat.redis_client import FAULTS, Client, Command, connect

__all__ = ["Command", "Link", "open_link"]

logger = logging.getLogger(__name__)

BUDGET = 0.025
"""Seconds that a question may take. A chat asks two that it can do without, one after the other:
its rate limit and its token counts; so it waits no longer than 50 ms."""
PROBE_BUDGET = 1.0
"""Seconds that a probe may take; nobody waits for it, and a busy event loop must not fail it."""
PROBE_INTERVAL = 0.5
"""Seconds between two probes."""
FIRST_PROBE_BUDGET = 0.5
"""Seconds that the start waits for the first one: a Redis that hangs must not delay it for long."""
COUNT_BUDGET = 1.0
"""Seconds that a count of keys may take."""
BATCH = 500
"""Commands that are sent together at most: a larger batch would take its budget by its size."""
WEIGHTS = {"LRANGE": 50}
"""For how many commands one stands whose answer may be large."""
BATCH_GRACE = 1.0
"""Seconds more that a batch may take: who has waited for it goes on by a timer of its own."""
LATE = 0.01
"""Seconds by which a timer may come late; later ones tell that this process was busy, not Redis."""

State = Literal["unknown", "up", "partly", "down"]


class Link:
    """
    Commands to Redis, under a limit of time.

    Attributes:
        state: what the last probe found; partly: some nodes of a cluster are away.
    """

    def __init__(self, client: Client) -> None:
        self.state: State = "unknown"
        self._client = client
        self._lanes: dict[tuple[str, float], _Lane] = {}
        self._usable: frozenset[str] = frozenset()
        self._suspect = asyncio.Event()
        self._refusal = ""
        self._probing: asyncio.Task[None] | None = None

    async def ask(self, commands: Sequence[Command], *, budget: float = BUDGET) -> list[Any] | None:
        """
        Return the answer to each command, or None where Redis is not there, or refuses one.

        Args:
            commands: what belongs together; all for keys of one place, such as one key.
            budget: seconds that it may take.
        """
        lane = self._lane_of(commands[0], budget)
        if lane is None:
            return None
        question = _Question(commands)
        loop = asyncio.get_running_loop()
        due = loop.time() + budget
        timer = loop.call_at(due, self._give_up, lane, question, due, lane.batches)
        lane.put(question)
        try:
            return await question.answered
        finally:
            timer.cancel()

    async def look_up(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Return the values of those of the keys that have one, as far as Redis answers soon."""
        groups = self._by_place([("GET", key) for key in keys])
        answers = await asyncio.gather(*map(self.ask, groups))
        found: dict[str, bytes] = {}
        for group, values in zip(groups, answers, strict=True):
            pairs = zip(group, values or [None] * len(group), strict=True)
            found |= {str(key): value for (_, key), value in pairs if value is not None}
        return found

    def tell(self, commands: Sequence[Command]) -> None:
        """Send the commands soon, where Redis is there."""
        for group in self._by_place(commands):
            if lane := self._lane_of(group[0], BUDGET):
                lane.put(_Question(group))

    async def count(self, prefix: str) -> int:
        """
        Count the keys that begin so, exactly where there are few and else by a sample.

        Raises:
            TimeoutError: Redis is not there.
        """
        try:
            async with asyncio.timeout(COUNT_BUDGET):
                return await self._client.count(prefix)
        except FAULTS as error:
            raise TimeoutError from error

    async def probe(self, budget: float = PROBE_BUDGET) -> None:
        """Find out whether Redis takes what it is told, at each place."""
        faults: dict[str, BaseException | None] = {}
        try:
            async with asyncio.timeout(budget):
                keys = await self._client.keys()
            probes = [self._probe(key, budget) for key in keys.values()]
            faults = dict(zip(keys, await asyncio.gather(*probes), strict=True))
        except FAULTS as error:
            self._note("down", error)
        else:
            found = [fault for fault in faults.values() if fault]
            state: State = "up" if not found else "partly" if len(found) < len(faults) else "down"
            self._note(state, found[0] if found else None)
        self._usable = frozenset(place for place, fault in faults.items() if fault is None)
        self._open_lanes(faults)
        for place in faults.keys() - self._usable:
            with suppress(*FAULTS):
                async with asyncio.timeout(budget):
                    await self._client.look_around(place)

    def start(self) -> None:
        """Keep probing in the background."""
        self._probing = asyncio.create_task(self._probe_forever())

    async def aclose(self) -> None:
        """End what runs in the background, and close all connections."""
        if self._probing:
            self._probing.cancel()
        for lane in self._lanes.values():
            lane.close()
        await self._client.aclose()

    def _lane_of(self, command: Command, budget: float) -> "_Lane | None":
        """Return the lane for the command; None while it is of no use."""
        try:
            place = self._client.place_of(command)
        except FAULTS:
            return None
        lane = self._lanes.get((place, budget))
        if lane is None and place in self._usable:
            lane = self._lanes[place, budget] = _Lane(self, self._client, budget)
        return lane if lane and lane.is_usable else None

    def _by_place(self, commands: Sequence[Command]) -> list[list[Command]]:
        groups: dict[str, list[Command]] = {}
        for command in commands:
            with suppress(*FAULTS):
                groups.setdefault(self._client.place_of(command), []).append(command)
        return list(groups.values())

    def _give_up(self, lane: "_Lane", question: "_Question", due: float, batches: int) -> None:
        """Do without the answer; where this process was busy, it may be there already."""
        loop = asyncio.get_running_loop()
        if loop.time() > due + LATE:
            loop.call_later(LATE, question.resolve, None)
            return
        question.resolve(None)
        if lane.batches == batches:  # else Redis answers, and has much to do
            self.suspect(lane)

    def suspect(self, lane: "_Lane") -> None:
        """Use the lane no more until a probe has found that Redis is there."""
        lane.is_usable = False
        self._suspect.set()

    def _open_lanes(self, places: "dict[str, BaseException | None]") -> None:
        """Use the lanes of those places that answer, and end those of places that are gone."""
        for (place, budget), lane in list(self._lanes.items()):
            lane.is_usable = place in self._usable
            if places and place not in places:
                lane.close()
                del self._lanes[place, budget]

    async def _probe_forever(self) -> None:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._suspect.wait(), PROBE_INTERVAL)
            self._suspect.clear()
            try:
                await self.probe()
            except Exception:
                logger.exception("Redis could not be probed, by a fault of ours")

    async def _probe(self, key: str, budget: float) -> BaseException | None:
        """Return what is wrong; a server may answer, and yet take nothing: full, or a replica."""
        try:
            async with asyncio.timeout(budget):
                (answer,) = await self._client.execute([("SET", key, 1, "PX", 1)])
        except FAULTS as error:
            return error
        return answer if isinstance(answer, Exception) else None

    def note_refusal(self, answers: Sequence[object]) -> None:
        """Log by what a command was refused, once until the state changes; and look at that."""
        refusal = next((type(each).__name__ for each in answers if isinstance(each, Exception)), "")
        if refusal and refusal != self._refusal:
            self._refusal = refusal
            logger.warning("Redis refuses a command (%s)", refusal)
            self._suspect.set()

    def _note(self, state: State, fault: BaseException | None) -> None:
        if state == self.state:
            return
        self.state, self._refusal = state, ""
        metrics.REDIS_UP.set(state == "up")
        what = "a part of Redis" if state == "partly" else "Redis"
        if fault:
            logger.warning("%s cannot be used (%s)", what, type(fault).__name__)
        else:
            logger.info("Redis can be used")


class _Question:
    """Some commands that belong together, and where their answers go."""

    def __init__(self, commands: Sequence[Command]) -> None:
        self.commands = commands
        self.answered: asyncio.Future[list[Any] | None] = asyncio.get_running_loop().create_future()

    def resolve(self, answers: list[Any] | None) -> None:
        if not self.answered.done():
            self.answered.set_result(answers)


class _Lane:
    """
    What waits to be asked at one place with the same patience; one batch is on its way.

    Attributes:
        is_usable: whether anything should be asked.
        batches: how many batches have been answered.
    """

    def __init__(self, link: Link, client: Client, budget: float) -> None:
        self.is_usable = True
        self.batches = 0
        self._link = link
        self._client = client
        self._budget = budget
        self._waiting: list[_Question] = []
        self._has_waiting = asyncio.Event()
        self._running = asyncio.create_task(self._run())

    def put(self, question: _Question) -> None:
        self._waiting.append(question)
        self._has_waiting.set()

    def close(self) -> None:
        self._running.cancel()
        for question in self._waiting:
            question.resolve(None)

    async def _run(self) -> None:
        while await self._has_waiting.wait():
            batch = self._take()
            if not batch:
                continue
            commands = [command for question in batch for command in question.commands]
            answers = await self._execute(commands)
            for question in batch:
                count = len(question.commands)
                own, answers = answers[:count], answers[count:]
                is_refused = any(isinstance(answer, Exception) for answer in own)
                question.resolve(own if own and not is_refused else None)

    def _take(self) -> list[_Question]:
        """Take what goes into one batch: one question at least, whole ones only."""
        self._waiting = [each for each in self._waiting if not each.answered.done()]
        weight, taken = 0, 0
        for question in self._waiting:
            weight += sum(WEIGHTS.get(str(command[0]), 1) for command in question.commands)
            if taken and weight > BATCH:
                break
            taken += 1
        batch, self._waiting = self._waiting[:taken], self._waiting[taken:]
        if not self._waiting:
            self._has_waiting.clear()
        return batch

    async def _execute(self, commands: Sequence[Command]) -> list[Any]:
        try:
            async with asyncio.timeout(self._budget + BATCH_GRACE):
                answers = await self._client.execute(commands)
        except FAULTS:
            self._link.suspect(self)
            return []
        except Exception:
            logger.exception("Redis could not be asked, by a fault of ours")
            self._link.suspect(self)
            return []
        self.batches += 1
        self._link.note_refusal(answers)
        return answers


@asynccontextmanager
async def open_link(address: str, password: str) -> AsyncIterator[Link]:
    """Open the link to Redis, which need not be there yet."""
    link = Link(connect(address, password))
    try:
        await link.probe(FIRST_PROBE_BUDGET)
        link.start()
        yield link
    finally:
        await link.aclose()
