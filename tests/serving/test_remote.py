"""Remote pictures: allowed URLs, redirects and limits, against servers on loopback.

The tests replace the fetcher's resolver and its address check in order to reach loopback.
"""

from __future__ import annotations

import asyncio
import datetime
import gzip
import ipaddress
import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from yarl import URL

from umarvel_ray.errors import UserError
from umarvel_ray.serving.remote import AllowedHost, BadRemote, RemotePictures, is_public, resolve
from umarvel_ray.serving.settings import Limits

PICTURE = b"\x89PNG not read here"
HOST = "images.test"


REQUESTS: list[tuple[str, str, str | None]] = []  # host, path, accepted encoding of each request
REDIRECTS: dict[str, str] = {}


class Site(BaseHTTPRequestHandler):
    """`/a` is a picture; the other paths misbehave as their names say."""

    protocol_version = "HTTP/1.1"
    stop = threading.Event()

    def do_GET(self) -> None:
        REQUESTS.append((self.headers["Host"], self.path, self.headers["Accept-Encoding"]))
        if self.path in REDIRECTS:
            self._answer(302, Location=REDIRECTS[self.path])
        elif self.path == "/slow":
            self._answer(200, length=1000)
            self.stop.wait(5)
        elif self.path == "/endless":
            self._answer(200, length=None)
            while not self.stop.is_set():
                self.wfile.write(b"10000\r\n" + b"x" * 65_536 + b"\r\n")
        elif self.path == "/packed":
            self._answer(200, gzip.compress(b"x" * 10_000_000), Content_Encoding="gzip")
        elif self.path == "/gone":
            self._answer(404)
        else:
            self._answer(200, PICTURE)

    def _answer(self, status: int, body: bytes = b"", length: int | None = -1, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if length is None:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(length if length >= 0 else len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, *args: object) -> None:
        pass  # clients that disconnect


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> dict[str, str]:
    """A self-signed certificate for `HOST`, as arguments of `load_cert_chain`."""
    folder = tmp_path_factory.mktemp("certificate")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "certificate").write_bytes(made.public_bytes(pem))
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key").write_bytes(secret)
    return {"certfile": str(folder / "certificate"), "keyfile": str(folder / "key")}


def running(tls: ssl.SSLContext | None) -> Iterator[int]:
    server = Server(("127.0.0.1", 0), Site)
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server.server_port
    Site.stop.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    yield from running(None)


@pytest.fixture(scope="module")
def tls_port(certificate) -> Iterator[int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(**certificate)
    yield from running(context)


@pytest.fixture(autouse=True)
def _fresh():
    REQUESTS.clear()
    REDIRECTS.clear()


class Names:
    """A resolver with prepared answers that records the hosts it was asked for."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers, self.asked = list(answers or [["127.0.0.1"]]), []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        return self.answers[min(len(self.asked), len(self.answers)) - 1]


def fetch(
    *urls: str,
    hosts: tuple[str, ...] = (),
    names: Names | None = None,
    trusted: Callable[[str], bool] = "127.0.0.1".__eq__,
    **limits: float,
) -> list[bytes]:
    async def run() -> list[bytes]:
        remote = RemotePictures(Limits(allowed_media_hosts=hosts, **limits), names or Names(), trusted)
        return await remote.fetch(urls)

    found = asyncio.run(run())
    for bad in (one for one in found if isinstance(one, BadRemote)):
        raise bad
    return found


def test_a_picture_from_an_allowed_host(port):
    names = Names()
    hosts = (f"http://{HOST}:{port}",)
    assert (
        fetch(f"http://{HOST}:{port}/a", f"http://{HOST.upper()}:{port}/b?c#d", hosts=hosts, names=names)
        == [PICTURE] * 2
    )
    assert {host.lower() for host, _, _ in REQUESTS} == {f"{HOST}:{port}"}
    assert sorted((path, encoding) for _, path, encoding in REQUESTS) == [("/a", "identity"), ("/b?c", "identity")]
    assert names.asked == [HOST, HOST]


def test_https_checks_the_certificate_against_the_name(tls_port, certificate, monkeypatch):
    hosts = (f"{HOST}:{tls_port}", f"other.test:{tls_port}")
    url = f"https://{HOST}:{tls_port}/a"
    with pytest.raises(BadRemote, match="Certificate"):
        fetch(url, hosts=hosts)
    monkeypatch.setenv("SSL_CERT_FILE", certificate["certfile"])
    assert fetch(url, hosts=hosts) == [PICTURE]
    with pytest.raises(BadRemote, match="Certificate"):
        fetch(f"https://other.test:{tls_port}/a", hosts=hosts)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/passwd", "only https"),
        ("ftp://images.test/a", "only https"),
        ("/etc/passwd", "only https"),
        ("images.test/a", "only https"),
        ("", "only https"),
        ("https://", "not a URL|only https"),
        ("https://[::1/a", "not a URL"),
        ("https://images.test:99999/a", "not a URL"),
        ("https://images.test/" + "a" * 2048, "not a URL"),
        ("http://images.test/a", "allow-list"),
        ("https://images.test:8443/a", "allow-list"),
        ("https://images.test.evil.test/a", "allow-list"),
        ("https://evilimages.test/a", "allow-list"),
        ("https://images.test./a", "allow-list"),
        ("https://below.test/a", "allow-list"),
        ("https://xbelow.test/a", "allow-list"),
        ("https://evil.test/images.test", "allow-list"),
        ("https://evil.test#@images.test/a", "allow-list"),
        ("https://images.test@evil.test/a", "user or password"),
        ("https://evil.test\\@images.test/a", "not a URL"),
        ("https://images.test\t.evil.test/a", "allow-list"),
        ("https://images.test%00.evil.test/a", "allow-list"),
        ("https://me:word@images.test/a", "user or password"),
        ("https://127.0.0.1/a", "allow-list"),
        ("https://[::ffff:127.0.0.1]/a", "allow-list"),
        ("https://2130706433/a", "allow-list"),
        ("https://ⅰmages.test.evil.test/a", "allow-list"),
    ],
)
def test_disallowed_urls_are_not_even_resolved(url, message):
    names = Names()
    with pytest.raises(BadRemote, match=message):
        fetch(url, hosts=("images.test", "*.below.test"), names=names)
    assert names.asked == []


def test_wildcards_allow_every_host_below():
    below = AllowedHost.parse("*.Example.org")
    urls = ["https://a.example.org/", "https://a.b.example.org/", "https://example.org/", "https://aexample.org/"]
    assert [below.allows(URL(url)) for url in urls] == [True, True, False, False]


def test_without_an_allow_list_nothing_is_fetched():
    with pytest.raises(BadRemote, match="does not fetch remote pictures"):
        fetch("https://images.test/a")


@pytest.mark.parametrize(
    "entry", ["", "*", "https://", "a/b", "user@a.test", "10.0.0.1", "ftp://a.test", "a.test:", "*.*.test", "0x7f.1"]
)
def test_a_bad_entry_is_a_user_error(entry):
    with pytest.raises(UserError, match="allowed_media_hosts"):
        RemotePictures(Limits(allowed_media_hosts=(entry,)))


PRIVATE = [
    *("127.0.0.1", "127.8.9.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
    *(
        "224.0.0.1",
        "239.1.2.3",
        "240.0.0.1",
        "255.255.255.255",
        "192.0.2.1",
        "198.18.0.1",
        "198.51.100.7",
        "203.0.113.9",
    ),
    *(
        "::",
        "::1",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "fc00::1",
        "fd12:3456::1",
        "ff02::1",
        "ff0e::1",
        "2001:db8::1",
    ),
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:a9fe:a9fe", "::127.0.0.1", "2002:7f00:1::", "2002:a00:1::1"),
    *("64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "100::1"),
]
PUBLIC = ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::1"]


def test_only_the_public_internet_is_public():
    assert [address for address in PRIVATE if is_public(address)] == []
    assert [address for address in PUBLIC if not is_public(address)] == []
    assert all(ipaddress.ip_address(address) for address in PRIVATE + PUBLIC)


@pytest.mark.parametrize(
    "answers", [["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["2606:4700::1111", "::ffff:10.0.0.1"], []]
)
def test_one_private_address_is_enough_to_reject(port, answers):
    with pytest.raises(BadRemote, match="not public") as error:
        fetch(f"http://{HOST}:{port}/a", hosts=(f"http://{HOST}:{port}",), names=Names(answers), trusted=is_public)
    assert "10.0" not in str(error.value)
    assert REQUESTS == []


def test_the_system_resolver_is_checked_too(port):
    assert "127.0.0.1" in asyncio.run(resolve("localhost", port))
    remote = RemotePictures(Limits(allowed_media_hosts=(f"http://localhost:{port}",)))
    [rejected] = asyncio.run(remote.fetch([f"http://localhost:{port}/a"]))
    assert "not public" in str(rejected)
    assert REQUESTS == []


def test_the_checked_address_is_the_one_connected_to(port):
    """DNS rebinding: the name is resolved once, and the checked address is used."""
    names = Names(["127.0.0.1"], ["127.0.0.9"])
    assert fetch(f"http://{HOST}:{port}/a", hosts=(f"http://{HOST}:{port}",), names=names) == [PICTURE]
    assert names.asked == [HOST]


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("http://127.0.0.1:{port}/a", "allow-list"),
        ("http://other.test:{port}/a", "allow-list"),
        ("http://me:word@images.test:{port}/a", "user or password"),
        ("file:///etc/passwd", "only https"),
        ("//other.test/a", "allow-list"),
        ("/moved", "over 3 redirects"),
        ("", "over 3 redirects|only https"),
        ("http://[", "not a URL"),
    ],
)
def test_a_redirect_is_checked_like_the_first_url(port, to, message):
    REDIRECTS["/moved"] = to.format(port=port)
    with pytest.raises(BadRemote, match=message):
        fetch(f"http://{HOST}:{port}/moved", hosts=(f"http://{HOST}:{port}",))
    assert {path for _, path, _ in REQUESTS} == {"/moved"}


def test_a_redirect_is_resolved_again(port):
    hosts = (f"http://{HOST}:{port}", f"http://other.test:{port}")
    REDIRECTS.update({"/1": "/2", "/2": f"http://other.test:{port}/3", "/3": "/a"})
    names = Names()
    assert fetch(f"http://{HOST}:{port}/1", hosts=hosts, names=names) == [PICTURE]
    assert [path for _, path, _ in REQUESTS] == ["/1", "/2", "/3", "/a"]
    # The name resolves to an allowed address at first and to a private one at a later hop.
    with pytest.raises(BadRemote, match="not public"):
        fetch(f"http://{HOST}:{port}/1", hosts=hosts, names=Names(["127.0.0.1"], ["127.0.0.1"], ["192.168.0.1"]))


def test_bytes_time_and_status_are_limited(port):
    hosts = (f"http://{HOST}:{port}",)
    url = f"http://{HOST}:{port}"
    with pytest.raises(BadRemote, match="over 300000 bytes"):
        fetch(f"{url}/endless", hosts=hosts, max_image_bytes=300_000)
    with pytest.raises(BadRemote, match="request's remote pictures are over 30 bytes"):
        fetch(*[f"{url}/a"] * 3, hosts=hosts, max_remote_bytes=30)
    with pytest.raises(BadRemote, match=r"over 0\.3 seconds"):
        fetch(f"{url}/slow", hosts=hosts, remote_timeout_s=0.3)
    with pytest.raises(BadRemote, match="status 404"):
        fetch(f"{url}/gone", hosts=hosts)
    [packed] = fetch(f"{url}/packed", hosts=hosts, max_image_bytes=100_000)
    assert packed[:2] == b"\x1f\x8b"  # not unpacked
    with pytest.raises(BadRemote, match="cannot be fetched"):
        fetch("http://images.test:1/a", hosts=("http://images.test:1",))
