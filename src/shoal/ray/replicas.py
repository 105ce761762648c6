"""The replicas that there are: asked each second, and how much each has to do."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray.serve.exceptions import DeploymentUnavailableError

from shoal.openai.schema import APIError
from shoal.ray.replica import State
from shoal.ray.routing import choose
from shoal.ray.upstream import Pool
from shoal.server.service import unavailable

_POLL_SECONDS = 1.0
_ANSWER_SECONDS = 5.0
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Upstream:
    """A replica as this ingress sees it: ``in_flight`` requests are from here, ``others`` from other ingresses."""

    name: str
    pool: Pool
    in_flight: int = 0
    others: int = 0

    @property
    def load(self) -> int:
        """Requests under way."""
        return self.in_flight + self.others


class Replicas:
    """All replicas that take requests. ``engines`` is Ray Serve's handle of their deployment, ``app`` what those say that let this
    ingress in."""

    def __init__(self, engines: Any, spill_above: int, app: str) -> None:
        self._engines, self._spill_above, self._app = engines, spill_above, app
        self._known: dict[str, Upstream] = {}
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._known)

    async def watch(self) -> None:
        """Ask for ever."""
        while True:
            before = {name: known.in_flight for name, known in self._known.items()}
            try:
                self.update(await self.ask_all("state"), before)
            except TimeoutError:
                _log.warning("a replica has not said for %g s how it is", _ANSWER_SECONDS)
            except Exception:  # of Ray's: those that are known stay
                _log.exception("the replicas could not be asked")
            await asyncio.sleep(_POLL_SECONDS)

    async def ask_all(self, method: str) -> list[Any]:
        """What a method of each replica returns; of those that cannot be asked nothing. Raises TimeoutError."""
        try:
            asked = self._engines.broadcast(method)
            answers = await asked.results_async(timeout_s=_ANSWER_SECONDS, return_exceptions=True)
        except DeploymentUnavailableError:
            return []
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    def update(self, states: Sequence[State], before: dict[str, int]) -> None:
        """These there are now. ``before``: how many requests each had from here when it was asked."""
        well = {state.name: state for state in states if state.health == "ok" and state.app == self._app}
        for name in self._known.keys() - well.keys():
            self.lose(self._known[name])
        for name, state in well.items():
            known = self._known.setdefault(name, Upstream(name, Pool(state.host, state.port)))
            known.others = max(0, state.in_flight - max(known.in_flight, before.get(name, 0)))
        self._changed.set()

    def lose(self, gone: Upstream) -> None:
        """It takes nothing new, until it is heard of again; what it is at it may end."""
        if self._known.get(gone.name) is gone:
            del self._known[gone.name]
            gone.pool.close()

    async def choose(self, keys: Sequence[bytes], deadline: float) -> Upstream:
        """The one for a request with these keys. Raises APIError (503) where there is none until ``deadline``, a time of the loop's."""
        while not self._known:
            self._changed.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._changed.wait()
            except TimeoutError:
                raise none_ready() from None
        loads = {name: known.load for name, known in self._known.items()}
        return self._known[choose(keys, loads, self._spill_above)]


def none_ready() -> APIError:
    """503: they are being started, or have all failed."""
    return unavailable("no replica of the model is ready")
