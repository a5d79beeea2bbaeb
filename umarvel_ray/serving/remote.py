"""Fetches pictures for clients, only from hosts that the operator allows and never from a private network (no SSRF).

A host is resolved once, its addresses are checked, and the checked address is connected to (no DNS rebinding).
Redirects are followed by hand, and every hop is checked like the first URL.
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
MAX_CONCURRENT = 8  # fetches per replica
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_ALLOWED = re.compile(r"(?:(https?)://)?(\*\.)?((?:[a-z0-9-]{1,63}\.)*[a-z0-9-]{1,63})(?::(\d{1,5}))?", re.IGNORECASE)

Resolve = Callable[[str, int], Awaitable[list[str]]]


class BadRemote(UserError):
    """A remote picture that must not or cannot be fetched."""


@dataclass(frozen=True)
class AllowedHost:
    """One entry of the allow-list; with `below`, every host below `host` but not `host` itself."""

    scheme: str
    host: str
    port: int
    below: bool

    @classmethod
    def parse(cls, entry: str) -> AllowedHost:
        """Parse `[http://][*.]host[:port]`; https and its port are the defaults.

        Raises:
            UserError: the entry does not have this form.
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
    """Whether a numeric address, and any IPv4 address embedded in it, belongs to the public internet."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        embedded = ip.ipv4_mapped or ip.sixtofour or (ipaddress.IPv4Address(ip.packed[12:]) if ip in _NAT64 else None)
        if embedded is not None:
            return is_public(str(embedded))
        if ip.teredo or ip.is_site_local:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified or ip.is_loopback)


async def resolve(host: str, port: int) -> list[str]:
    """All addresses of a host, from the system's resolver."""
    entries = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in entries]


class RemotePictures:
    """Fetches pictures within `limits`.

    Tests replace `resolve` and `is_public` to use their own network; nothing else bypasses the address check.
    """

    def __init__(
        self, limits: Limits, resolve: Resolve = resolve, is_public: Callable[[str], bool] = is_public
    ) -> None:
        self._limits = limits
        self._hosts = [AllowedHost.parse(entry) for entry in limits.allowed_media_hosts]
        self._resolver = _CheckedResolver(resolve, is_public)
        self._tls = ssl.create_default_context()
        self._slots = asyncio.Semaphore(MAX_CONCURRENT)

    async def fetch(self, urls: Sequence[str]) -> list[bytes | BadRemote]:
        """The content of each URL, in order, or the reason why it is not fetched."""
        left = [self._limits.max_remote_bytes]  # one budget, shared by all URLs of the request
        return await asyncio.gather(*(self._fetch_one(url, left) for url in urls))

    async def _fetch_one(self, url: str, left: list[int]) -> bytes | BadRemote:
        try:
            async with asyncio.timeout(self._limits.remote_timeout_s), self._slots:
                return await self._follow(self._checked(url), left)
        except BadRemote as error:
            return error
        except TimeoutError:
            return BadRemote(f"took over {self._limits.remote_timeout_s:g} seconds to fetch")
        # Addresses and local causes are left out: they would reveal this network to clients.
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return BadRemote(f"cannot be fetched ({type(error).__name__})")

    async def _follow(self, url: URL, left: list[int]) -> bytes:
        connector = aiohttp.TCPConnector(resolver=self._resolver, use_dns_cache=False, force_close=True, ssl=self._tls)
        async with aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": "umarvel-ray", "Accept": "image/*", "Accept-Encoding": "identity"},
            auto_decompress=False,  # a compressed response is not a picture: it is never unpacked
        ) as session:
            for _ in range(MAX_REDIRECTS + 1):
                async with session.get(url, allow_redirects=False) as response:
                    if response.status not in (301, 302, 303, 307, 308):
                        return await self._read(response, left)
                    url = self._checked(response.headers.get("Location", ""), url)
        raise BadRemote(f"over {MAX_REDIRECTS} redirects")

    async def _read(self, response: aiohttp.ClientResponse, left: list[int]) -> bytes:
        if response.status != 200:
            raise BadRemote(f"its host responds with status {response.status}")
        max_bytes = self._limits.max_image_bytes
        body = bytearray()
        async for chunk in response.content.iter_any():
            body += chunk
            left[0] -= len(chunk)
            if len(body) > max_bytes:
                raise BadRemote(f"over {max_bytes} bytes")
            if left[0] < 0:
                raise BadRemote(f"the request's remote pictures are over {self._limits.max_remote_bytes} bytes")
        return bytes(body)

    def _checked(self, location: str, base: URL | None = None) -> URL:
        """Parse and check a URL. The checked object itself is requested, so no second parser can disagree.

        Raises:
            BadRemote: the URL is malformed or not allowed.
        """
        if not self._hosts:
            raise BadRemote("this service does not fetch remote pictures; send a data URI or base64")
        try:
            if len(location) > MAX_URL:
                raise ValueError
            url = base.join(URL(location)) if base else URL(location)
            host, port = url.raw_host, url.port
        except ValueError:
            raise BadRemote(f"not a URL of at most {MAX_URL} characters") from None
        if url.scheme not in ("https", "http") or not host or port is None:
            raise BadRemote("only https:// URLs are fetched")
        if url.raw_user is not None or url.raw_password is not None:
            raise BadRemote("a URL with a user or password is not fetched")
        if _is_address(host) or not any(allowed.allows(url) for allowed in self._hosts):
            raise BadRemote("its host, scheme or port is not on this service's allow-list")
        return url


class _CheckedResolver(AbstractResolver):
    """Returns checked addresses; aiohttp connects to nothing else."""

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
    # Includes what the C library accepts as an address: 127.1, 0x7f000001, 2130706433.
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return re.fullmatch(r"(?i)(?:0x[0-9a-f]*|\d+)(?:\.(?:0x[0-9a-f]*|\d+))*\.?", host) is not None
    return True


def _port(scheme: str) -> int:
    return {"http": 80, "https": 443}[scheme]
