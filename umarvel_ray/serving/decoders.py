"""A few decoding processes, shared by an ingress replica's requests, and what one request may use of them."""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgpack

from umarvel_ray.data.content import MEDIA
from umarvel_ray.errors import UserError
from umarvel_ray.items.pictures import Picture, PictureFormat
from umarvel_ray.serving.decoder import read_message, unpacked, write_message
from umarvel_ray.serving.settings import Limits

AT_ONCE = 2  # items of one request that are decoded at the same time


class Decoder:
    """One process, started when it is first needed and again after it has been ended."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._process: subprocess.Popen[bytes] | None = None

    def read(self, item: dict[str, Any], form: PictureFormat, where: str) -> tuple[Picture, ...]:
        """The item's pictures and video. Blocks.

        Raises:
            UserError: they cannot be used, or the process ended over them.
        """
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            write_message(process.stdin, pickle.dumps((item, form, where)))
            answer = read_message(process.stdout)
        except OSError:
            answer = b""
        if not answer:
            self.end()
            raise UserError(f"{where}: decoding it failed")
        reply = msgpack.unpackb(answer)
        if "error" in reply:
            raise UserError(reply["error"])
        return tuple(map(unpacked, reply["pictures"]))

    def end(self) -> None:
        """End the process, whatever it is doing."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "umarvel_ray.serving.decoder", str(self._max_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"},
        )
        return self._process


class Budget:
    """The seconds of decoding that a request has left."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.left = seconds, seconds
        self.places = asyncio.Semaphore(AT_ONCE)


class Decoders:
    """The decoding processes of an ingress replica; requests take turns, item by item."""

    def __init__(self, limits: Limits) -> None:
        self._seconds = limits.max_decode_s
        count = max(1, (os.cpu_count() or 1) // 2)
        self._threads = ThreadPoolExecutor(count, "decoder")
        self._idle: asyncio.LifoQueue[Decoder] = asyncio.LifoQueue()
        for _ in range(count):
            self._idle.put_nowait(Decoder(limits.decoder_bytes))

    def budget(self) -> Budget:
        """What one request may use."""
        return Budget(self._seconds)

    async def read(self, item: dict[str, Any], form: PictureFormat, where: str, budget: Budget) -> tuple[Picture, ...]:
        """The pictures and video of an item, as `ItemEncoder.pictures` reads them.

        Being cancelled ends the process that is at work on them.

        Raises:
            UserError: they cannot be used, or the request has no time left for them.
        """
        media = {key: item[key] for key in MEDIA if key in item}
        if not media:
            return ()
        async with budget.places:
            if budget.left <= 0:
                raise _out_of_time(where, budget)
            decoder = await self._idle.get()
            started = time.monotonic()
            reading = asyncio.get_running_loop().run_in_executor(self._threads, decoder.read, media, form, where)
            try:
                async with asyncio.timeout(budget.left):
                    return await asyncio.shield(reading)
            except TimeoutError:
                raise _out_of_time(where, budget) from None
            finally:
                budget.left -= time.monotonic() - started
                if not reading.done():
                    decoder.end()
                    await asyncio.wait([reading])
                    reading.exception()  # that its process was ended is no news
                self._idle.put_nowait(decoder)


def _out_of_time(where: str, budget: Budget) -> UserError:
    return UserError(
        f"{where}: to decode this request's pictures and videos takes over {budget.seconds:g} s; send fewer at a time"
    )
