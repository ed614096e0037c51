"""Files behind links: what a worker sends can be fetched for a while, and is harmless in a browser."""

import base64
import http.client
import json
import unittest
import urllib.parse

from gateway import PATIENCE, Gateway, GatewayTest, until

SCRIPT = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"


def path_of(url):
    """Where the gateway serves what `webchat://file/{id}/{filename}` names."""
    assert url.startswith("webchat://file/"), url
    return "/files/" + url.removeprefix("webchat://file/")


def send(gateway, channel, data, filename="f.bin", mimetype=None):
    named = {"mimetype": mimetype} if mimetype else {}
    return gateway.api("file", {"channel_id": channel, "filename": filename, "data": base64.b64encode(data).decode(), **named})


class Links(GatewayTest):
    def link(self, data, filename="f.bin", mimetype=None):
        return path_of(send(self.gateway, self.user, data, filename, mimetype)["url"])

    def fetch(self, path, method="GET", **headers):
        return self.gateway.http(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})

    def assert_harmless(self, answer):
        self.assertEqual(answer.headers["X-Content-Type-Options"], "nosniff")
        self.assertEqual(answer.headers["Content-Security-Policy"], "sandbox; default-src 'none'")
        self.assertEqual(answer.headers["Cross-Origin-Resource-Policy"], "cross-origin")

    def test_what_a_user_s_tabs_got_is_behind_the_link(self):
        tab = self.tab()
        content = bytes(range(256)) * 3000  # large enough to be encoded apart
        answer = send(self.gateway, self.user, content, "bild ü.png", "image/png")
        frame = tab.find("file", id=answer["id"])
        self.assertEqual(answer["url"], f"webchat://file/{frame['id']}/bild%20%C3%BC.png")
        got = self.fetch(path_of(answer["url"]))
        self.assertEqual((got.status, got.body), (200, content))
        self.assertEqual(base64.b64decode(frame["data"]), content)
        self.assertEqual((got.headers["Content-Type"], got.headers["Content-Length"]), ("image/png", str(len(content))))
        self.assertEqual(got.headers["Content-Disposition"], "inline; filename=\"bild _.png\"; filename*=UTF-8''bild%20%C3%BC.png")
        self.assertEqual((got.headers["Accept-Ranges"], got.headers["ETag"]), ("bytes", f'"{answer["id"]}"'))
        self.assertRegex(got.headers["Cache-Control"], r"^private, max-age=3[56]\d\d, immutable$")
        self.assert_harmless(got)

    def test_a_room_s_file_and_one_that_reached_nobody_have_links_too(self):
        room = f"den-{self.user}"
        tab = self.tab()
        self.assertEqual(tab.ask(type="join", room=room)["type"], "ack")
        answer = send(self.gateway, f"room:{room}", b"to all", "a.txt", "text/plain")
        self.assertIs(answer["delivered"], True)
        frame = tab.find("file")
        got = self.fetch(f"/files/{frame['id']}/{urllib.parse.quote(frame['filename'])}")
        self.assertEqual((got.status, got.body, got.headers["Content-Type"]), (200, b"to all", "text/plain"))
        nobody = send(self.gateway, f"room:{room}-empty", b"to nobody")
        self.assertIs(nobody["delivered"], False)
        self.assertEqual(self.fetch(path_of(nobody["url"])).body, b"to nobody")

    def test_raw_bytes_and_lines_of_a_batch_have_links(self):
        for content in (b"", b"small", bytes(200_000)):
            with self.subTest(len(content)):
                target = f"/api/file?channel_id={self.user}&filename=raw.webp"
                answer = self.gateway.http("POST", target, content, {"Content-Type": "image/webp", "X-Tabcast-Raw": "1"}).json()
                got = self.fetch(path_of(answer["url"]))
                self.assertEqual((got.status, got.body, got.headers["Content-Type"]), (200, content, "image/webp"))
        line = json.dumps({"op": "file", "channel_id": self.user, "filename": "b", "data": "YWI="}).encode()
        answer = self.gateway.http("POST", "/api/batch", line + b"\n" + line, {"Content-Type": "application/x-ndjson"})
        urls = [json.loads(line)["url"] for line in answer.body.splitlines()]
        self.assertEqual([self.fetch(path_of(url)).body for url in urls], [b"ab", b"ab"])

    def test_head_says_what_get_would(self):
        path = self.link(b"0123456789", "a.gif", "image/gif")
        connection = http.client.HTTPConnection("127.0.0.1", self.gateway.port, timeout=PATIENCE)
        self.addCleanup(connection.close)
        answers = []
        for method in ("GET", "HEAD", "GET"):  # over one connection: a body after HEAD would be the next answer's head
            connection.request(method, path, headers={"Range": "bytes=0-3"} if method == "HEAD" else {})
            response = connection.getresponse()
            answers.append((response.status, {name.lower(): value for name, value in response.getheaders() if name.lower() not in ("date", "cache-control")}, response.read()))
        self.assertEqual(answers[0], answers[2])
        self.assertEqual(answers[0][:2], answers[1][:2])
        self.assertEqual((answers[0][1]["content-length"], answers[0][2], answers[1][2]), ("10", b"0123456789", b""))

    def test_a_copy_that_is_there_is_not_sent_again(self):
        path = self.link(b"content")
        tag = self.fetch(path).headers["ETag"]
        for method in ("GET", "HEAD"):
            got = self.fetch(path, method, If_None_Match=f'"other", W/{tag}')
            self.assertEqual((got.status, got.body, got.headers["ETag"]), (304, b"", tag))
            self.assertIn("immutable", got.headers["Cache-Control"])
        self.assertEqual(self.fetch(path, If_None_Match='"other"').status, 200)

    def test_parts(self):
        path = self.link(b"0123456789", "sound.mp3", "audio/mpeg")
        parts = {"bytes=0-3": (b"0123", "bytes 0-3/10"), "bytes=4-": (b"456789", "bytes 4-9/10"), "bytes=-2": (b"89", "bytes 8-9/10"), "bytes=8-99": (b"89", "bytes 8-9/10")}
        for wanted, (body, named) in parts.items():
            with self.subTest(wanted):
                got = self.fetch(path, Range=wanted)
                self.assertEqual((got.status, got.body, got.headers["Content-Range"]), (206, body, named))
                self.assertEqual((got.headers["Content-Length"], got.headers["Content-Type"]), (str(len(body)), "audio/mpeg"))
                self.assert_harmless(got)
        for wanted in ("bytes=0-1,4-5", "bytes=3-1", "lines=1-2", "nonsense"):
            with self.subTest(wanted):
                got = self.fetch(path, Range=wanted)
                self.assertEqual((got.status, got.body, got.headers["Content-Range"]), (200, b"0123456789", None))
        for wanted in ("bytes=10-", "bytes=-0"):
            with self.subTest(wanted):
                got = self.fetch(path, Range=wanted)
                self.assertEqual(self.assert_error(got, 416)["code"], "range_not_satisfiable")
                self.assertEqual(got.headers["Content-Range"], "bytes */10")
        tag = self.fetch(path).headers["ETag"]
        self.assertEqual(self.fetch(path, Range="bytes=0-0", If_Range=tag).status, 206)
        self.assertEqual(self.fetch(path, Range="bytes=0-0", If_Range='"other"').status, 200)

    def test_what_could_run_is_saved_and_sandboxed(self):
        for mimetype in ("image/svg+xml", "text/html; charset=utf-8", "application/xhtml+xml", "text/xml", "application/pdf", "text/plain", "video/x+xml"):
            with self.subTest(mimetype):
                got = self.fetch(self.link(SCRIPT, "a.png", mimetype))
                self.assertEqual((got.status, got.body, got.headers["Content-Type"]), (200, SCRIPT, mimetype))
                self.assertEqual(got.headers["Content-Disposition"].split(";")[0], "attachment")
                self.assert_harmless(got)
        for mimetype in ("nonsense", "text/html, image/png", "image/png; a", "bild/ü", ""):
            with self.subTest(mimetype):
                got = self.fetch(self.link(SCRIPT, "a.png", mimetype))
                self.assertEqual(got.headers["Content-Type"], "application/octet-stream")
                self.assertEqual(got.headers["Content-Disposition"].split(";")[0], "attachment")

    def test_no_name_breaks_a_header_or_finds_a_path(self):
        names = {
            'a"; filename="b.exe': "a%22%3B%20filename%3D%22b.exe",
            "../../etc/passwd": ".._.._etc_passwd",
            "..\\up": ".._up",
            "%0d%0aX-Injected: 1": "%250d%250aX-Injected%3A%201",
            "日本 🌟\u2028.txt": "%E6%97%A5%E6%9C%AC%20%F0%9F%8C%9F%E2%80%A8.txt",
            "a;b,c='d'.txt": "a%3Bb%2Cc%3D%27d%27.txt",
        }
        for name, encoded in names.items():
            with self.subTest(name):
                got = self.fetch(self.link(b"x", name))
                self.assertEqual((got.status, got.body), (200, b"x"))
                plain, star = got.headers["Content-Disposition"].removeprefix('attachment; filename="').split("\"; filename*=UTF-8''")
                self.assertEqual(star, encoded)
                self.assertRegex(plain, r'^[ -~]*$')
                self.assertNotRegex(plain, r'["\\/%]')
                self.assertIsNone(got.headers["X-Injected"])
        refused = self.gateway.post("file", {"channel_id": self.user, "filename": "a\r\nX-Injected: 1", "data": ""})
        self.assert_error(refused, 400)

    def test_anything_else_is_not_found(self):
        path = self.link(b"x", "a.txt")
        stem = path.removesuffix("a.txt")
        for wrong in (stem, stem + "b.txt", stem + "A.txt", path + "/", path + "%00", stem + "..%2fa.txt", stem + "../a.txt", stem + ".", "/files/", "/files", "/files/x/a.txt", "/files/6c84fb90-12c4-41e1-840d-7b25c5ee7750/a.txt", "/files/..%2f..%2fetc/passwd", "/files/%2e%2e/%2e%2e/etc/passwd", stem + "%ff"):
            with self.subTest(wrong):
                self.assert_error(self.fetch(wrong), 404)
        self.assertEqual(self.fetch(path).body, b"x")
        self.assertEqual(self.fetch(path.replace("/files/", "//files//")).body, b"x", "double slashes collapse")
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            with self.subTest(method):
                answer = self.fetch(path, method)
                self.assert_error(answer, 405)
                self.assertEqual(answer.headers["Allow"], "GET, HEAD")


class WithKeys(GatewayTest):
    settings = {"api_keys": "worker-key"}

    def test_the_link_is_the_key(self):
        answer = self.gateway.api("file", {"channel_id": self.user, "filename": "a.png", "mimetype": "image/png", "data": "AAAA"}, Authorization="Bearer worker-key")
        elsewhere = {"Origin": "https://elsewhere.example", "Sec-Fetch-Site": "cross-site", "Authorization": "Bearer nonsense"}
        for headers in ({}, elsewhere):
            self.assertEqual(self.gateway.http("GET", path_of(answer["url"]), headers=headers).status, 200)


class Bounds(unittest.TestCase):
    def gateway(self, **settings):
        gateway = Gateway(**settings)
        self.addCleanup(gateway.stop)
        return gateway

    def status(self, gateway, path):
        return gateway.http("GET", path).status

    def test_a_link_ends_with_its_time(self):
        gateway = self.gateway(files_time="1s")
        path = path_of(send(gateway, "u", b"soon gone")["url"])
        got = gateway.http("GET", path)
        self.assertIn((got.status, got.headers["Cache-Control"]), [(200, "private, max-age=0, immutable"), (404, "no-store")])
        until("it has expired", lambda: self.status(gateway, path) == 404)

    def test_the_oldest_go_when_there_are_too_many_bytes(self):
        gateway = self.gateway(files_bytes_max="100KiB")
        paths = [path_of(send(gateway, "u", bytes(40 << 10), f"{number}")["url"]) for number in range(4)]
        self.assertEqual([self.status(gateway, path) for path in paths], [404, 404, 200, 200])
        tab = gateway.tab("u")
        self.addCleanup(tab.close)
        large = send(gateway, "u", bytes(101 << 10))
        self.assertEqual(tab.find("file", id=large["id"])["size"], 101 << 10, "sent all the same")
        self.assertEqual(self.status(gateway, path_of(large["url"])), 404)
        self.assertEqual([self.status(gateway, path) for path in paths], [404, 404, 200, 200])

    def test_the_oldest_go_when_there_are_too_many_files(self):
        gateway = self.gateway(files_max="2")
        paths = [path_of(send(gateway, "u", b"x")["url"]) for _ in range(3)]
        self.assertEqual([self.status(gateway, path) for path in paths], [404, 200, 200])

    def test_none_are_kept_where_there_is_no_room(self):
        gateway = self.gateway(files_bytes_max="0")
        tab = gateway.tab("u")
        self.addCleanup(tab.close)
        answer = send(gateway, "u", b"x")
        self.assertEqual(tab.find("file")["id"], answer["id"])
        self.assertEqual(self.status(gateway, path_of(answer["url"])), 404)

    def test_a_file_that_was_refused_has_no_link_and_takes_no_room(self):
        gateway = self.gateway(file_bytes_max="1KiB", files_bytes_max="2KiB")
        kept = path_of(send(gateway, "u", bytes(1000))["url"])
        refused = gateway.post("file", {"channel_id": "u", "filename": "f", "data": base64.b64encode(bytes(1025)).decode()})
        self.assertEqual(refused.status, 413, refused.body)
        self.assertEqual(self.status(gateway, kept), 200)


if __name__ == "__main__":
    unittest.main()
