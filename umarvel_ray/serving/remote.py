"""Pictures fetched for clients, from hosts the operator allows and never from a private network (no SSRF).

An address is looked up once, checked, and connected to: nothing is resolved again in between (no DNS rebinding).
Redirects are followed by hand and every hop is checked like the first URL.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from umarvel_ray.errors import UserError
from umarvel_ray.serving.settings import Limits

MAX_REDIRECTS = 3
MAX_URL = 2048  # characters
AT_ONCE = 8  # fetches of one replica
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_ALLOWED = re.compile(r"(?:(https?)://)?(\*\.)?((?:[a-z0-9-]{1,63}\.)*[a-z0-9-]{1,63})(?::(\d{1,5}))?", re.IGNORECASE)

Resolve = Callable[[str, int], Awaitable[list[str]]]


class BadRemote(UserError):
    """A remote picture that may not or cannot be fetched."""


@dataclass(frozen=True)
class AllowedHost:
    """One entry of the allow-list; `below`: every host under `host`, not itself."""

    scheme: str
    host: str
    port: int
    below: bool

    @classmethod
    def parse(cls, entry: str) -> AllowedHost:
        """`[http://][*.]host[:port]`; https and its port are the defaults.

        Raises:
            UserError: anything else.
        """
        match = _ALLOWED.fullmatch(entry)
        if not match or _is_address(match[3]):
            raise UserError(f"allowed_media_hosts: '{entry}' is not a host name; write [http://][*.]example.org[:port]")
        scheme = (match[1] or "https").lower()
        return cls(scheme, match[3].lower(), int(match[4] or _port(scheme)), match[2] is not None)

    def allows(self, url: URL) -> bool:
        host = url.raw_host or ""
        named = host.endswith(f".{self.host}") if self.below else host == self.host
        return named and (url.scheme, url.port) == (self.scheme, self.port)


def is_public(address: str) -> bool:
    """Whether a numeric address is one of the open internet's, and so is any IPv4 address within it."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        inside = ip.ipv4_mapped or ip.sixtofour or (ipaddress.IPv4Address(ip.packed[12:]) if ip in _NAT64 else None)
        if inside is not None:
            return is_public(str(inside))
        if ip.teredo or ip.is_site_local:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified or ip.is_loopback)


async def resolve(host: str, port: int) -> list[str]:
    """Every address the system's resolver knows for a host."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [entry[4][0] for entry in found]


class RemotePictures:
    """Fetches pictures within `limits`.

    `resolve` and `is_public` are what tests put their own network in by: the only way around the address check.
    """

    def __init__(
        self, limits: Limits, resolve: Resolve = resolve, is_public: Callable[[str], bool] = is_public
    ) -> None:
        self._limits = limits
        self._hosts = [AllowedHost.parse(entry) for entry in limits.allowed_media_hosts]
        self._resolver = _CheckedResolver(resolve, is_public)
        self._tls = ssl.create_default_context()
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def fetch(self, urls: Sequence[str]) -> list[bytes | BadRemote]:
        """The bytes behind each URL, in order, or why they may not or cannot be fetched."""
        left = [self._limits.max_remote_bytes]
        return await asyncio.gather(*(self._one(url, left) for url in urls))

    async def _one(self, written: str, left: list[int]) -> bytes | BadRemote:
        try:
            async with asyncio.timeout(self._limits.remote_timeout_s), self._turns:
                return await self._follow(self._checked(written), left)
        except BadRemote as error:
            return error
        except TimeoutError:
            return BadRemote(f"took over {self._limits.remote_timeout_s:g} seconds to fetch")
        # Addresses and local reasons stay here: they would tell a client about this network.
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return BadRemote(f"cannot be fetched ({type(error).__name__})")

    async def _follow(self, url: URL, left: list[int]) -> bytes:
        connector = aiohttp.TCPConnector(resolver=self._resolver, use_dns_cache=False, force_close=True, ssl=self._tls)
        async with aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": "umarvel-ray", "Accept": "image/*", "Accept-Encoding": "identity"},
            auto_decompress=False,  # a compressed answer is not a picture: it stays as small as it came
        ) as session:
            for _ in range(MAX_REDIRECTS + 1):
                async with session.get(url, allow_redirects=False) as answer:
                    if answer.status not in (301, 302, 303, 307, 308):
                        return await self._read(answer, left)
                    url = self._checked(answer.headers.get("Location", ""), url)
        raise BadRemote(f"over {MAX_REDIRECTS} redirects")

    async def _read(self, answer: aiohttp.ClientResponse, left: list[int]) -> bytes:
        if answer.status != 200:
            raise BadRemote(f"its host answers with status {answer.status}")
        most = self._limits.max_image_bytes
        body = bytearray()
        async for chunk in answer.content.iter_any():
            body += chunk
            left[0] -= len(chunk)
            if len(body) > most:
                raise BadRemote(f"over {most} bytes")
            if left[0] < 0:
                raise BadRemote(f"the request's remote pictures are over {self._limits.max_remote_bytes} bytes")
        return bytes(body)

    def _checked(self, written: str, base: URL | None = None) -> URL:
        """The URL that is asked and connected to; the same object is checked, so no second parser can disagree."""
        if not self._hosts:
            raise BadRemote("remote pictures are off here; send a data URI or base64")
        try:
            if len(written) > MAX_URL:
                raise ValueError
            url = base.join(URL(written)) if base else URL(written)
            host, port = url.raw_host, url.port
        except ValueError:
            raise BadRemote("not a URL of at most 2048 characters") from None
        if url.scheme not in ("https", "http") or not host or port is None:
            raise BadRemote("only https:// URLs are fetched")
        if url.raw_user is not None or url.raw_password is not None:
            raise BadRemote("a URL with a user or password is not fetched")
        if _is_address(host) or not any(allowed.allows(url) for allowed in self._hosts):
            raise BadRemote("its host, scheme or port is not on this service's allow-list")
        return url


class _CheckedResolver(AbstractResolver):
    """aiohttp connects to what this returns and to nothing else."""

    def __init__(self, resolve: Resolve, is_public: Callable[[str], bool]) -> None:
        self._resolve, self._is_public = resolve, is_public

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        addresses = await self._resolve(host, port)
        if not addresses or not all(self._is_public(address) for address in addresses):
            raise BadRemote("its host has no address, or one that is not public")
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for address in addresses
        ]

    async def close(self) -> None:
        pass


def _is_address(host: str) -> bool:
    # Also what the C library would take for one: 127.1, 0x7f000001, 2130706433.
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return re.fullmatch(r"(?i)(?:0x[0-9a-f]*|\d+)(?:\.(?:0x[0-9a-f]*|\d+))*\.?", host) is not None
    return True


def _port(scheme: str) -> int:
    return {"http": 80, "https": 443}[scheme]
