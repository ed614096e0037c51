"""What tabs and workers see of each other: the frames, the routes of /api, and what tabs may send."""

import base64
import hashlib
import hmac
import http.server
import json
import queue
import re
import threading
import time
import unittest
import urllib.parse

from gateway import PATIENCE, Gateway, GatewayTest, Tab, until

UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")


class FramesReachEveryTab(GatewayTest):
    def to_both(self, route, value, **headers):
        """What both tabs got, byte for byte the same, and the worker's answer."""
        tabs = self.tabs(2)
        answer = self.gateway.api(route, {"channel_id": f"webchat:{self.user}", **value}, **headers)
        texts = [tab.text() for tab in tabs]
        self.assertEqual(texts[0], texts[1])
        self.assertIsInstance(texts[0], str, "a text frame")
        self.assertIs(answer["delivered"], True)
        self.assertEqual(answer["tabs"], 2)
        return texts[0], answer

    def assert_keys(self, text, *keys):
        frame = json.loads(text)
        self.assertEqual(list(frame), list(keys))
        if "timestamp" in frame:
            self.assertIsInstance(frame["timestamp"], float)
        compact = text if "timestamp" not in frame else re.sub(r'"timestamp":[0-9.]+', '"timestamp":0', text)
        again = json.dumps({**frame, **({"timestamp": 0} if "timestamp" in frame else {})}, ensure_ascii=False, separators=(",", ":"))
        self.assertEqual(compact, again, "compact, raw UTF-8, nothing escaped that need not be")
        return frame

    def test_send(self):
        words = 'Grüße, 世界 🌟 "quoted" \\ back\n\ttab \u2028 <b>&amp;</b> '
        text, answer = self.to_both("send", {"text": words})
        frame = self.assert_keys(text, "type", "id", "text", "sender", "timestamp")
        self.assertEqual((frame["type"], frame["text"], frame["sender"]), ("message", words, "star"))
        self.assertEqual(frame["id"], answer["id"])
        self.assertTrue(UUID.fullmatch(frame["id"]))

    def test_an_empty_text_is_sent_as_is(self):
        text, _ = self.to_both("send", {"text": ""})
        self.assertEqual(json.loads(text)["text"], "")

    def test_a_reply_names_its_message_after_the_sender(self):
        target = "6c84fb90-12c4-41e1-840d-7b25c5ee7750"
        text, _ = self.to_both("send", {"text": "re", "reply_to": target})
        self.assertEqual(self.assert_keys(text, "type", "id", "text", "sender", "reply_to", "timestamp")["reply_to"], target)

    def test_a_bare_user_id_is_a_channel(self):
        tab = self.tab()
        self.gateway.api("send", {"channel_id": self.user, "text": "x"})
        self.assertEqual(tab.frame()["text"], "x")

    def test_buttons_from_a_list(self):
        buttons = [{"label": "Yes", "custom_id": "y", "emoji": "🎉", "style": "success", "disabled": True}, {"label": "Go", "custom_id": "", "style": "link", "url": "https://example.com/"}, {"custom_id": "bare"}]
        text, _ = self.to_both("buttons", {"text": "?", "buttons": buttons})
        frame = self.assert_keys(text, "type", "id", "text", "sender", "buttons", "timestamp")
        self.assertEqual(frame["type"], "message")
        self.assertEqual([list(button) for button in frame["buttons"]], [["label", "custom_id", "emoji", "style", "disabled"], ["label", "custom_id", "style", "url"], ["label", "custom_id"]])
        self.assertEqual(frame["buttons"][2], {"label": "", "custom_id": "bare"})

    def test_no_buttons_are_an_empty_list(self):
        text, _ = self.to_both("buttons", {"text": "?", "buttons": []})
        self.assertEqual(self.assert_keys(text, "type", "id", "text", "sender", "buttons", "timestamp")["buttons"], [])

    def test_buttons_from_a_view(self):
        view = {"children": [{"children": [{"label": "A", "custom_id": "a"}, {"custom_id": "no label"}]}, {"children": [{"label": "B", "custom_id": "b", "style": "danger"}]}]}
        text, _ = self.to_both("buttons", {"text": "?", "view": view})
        self.assertEqual([button["label"] for button in json.loads(text)["buttons"]], ["A", "B"])

    def test_a_file_in_json(self):
        text, answer = self.to_both("file", {"filename": "bild ü.png", "mimetype": "image/png", "data": base64.b64encode(PIXEL).decode()})
        frame = self.assert_keys(text, "type", "id", "filename", "mimetype", "data", "size", "timestamp")
        self.assertEqual((frame["filename"], frame["mimetype"], frame["size"]), ("bild ü.png", "image/png", len(PIXEL)))
        self.assertEqual(base64.b64decode(frame["data"], validate=True), PIXEL)
        self.assertEqual(frame["id"], answer["id"])

    def test_an_empty_file_without_a_type(self):
        text, _ = self.to_both("file", {"filename": "empty", "data": ""})
        frame = json.loads(text)
        self.assertEqual((frame["mimetype"], frame["data"], frame["size"]), ("application/octet-stream", "", 0))

    def test_a_raw_file(self):
        tabs = self.tabs(2)
        content = bytes(range(256)) * 300
        path = f"/api/file?channel_id=webchat:{self.user}&filename=all%20bytes.bin"
        answer = self.gateway.http("POST", path, content, {"Content-Type": "image/webp", "X-Tabcast-Raw": "1"})
        self.assertEqual(answer.status, 200, answer.body)
        texts = [tab.text() for tab in tabs]
        self.assertEqual(texts[0], texts[1])
        frame = json.loads(texts[0])
        self.assertEqual((frame["filename"], frame["mimetype"], frame["size"]), ("all bytes.bin", "image/webp", len(content)))
        self.assertEqual(base64.b64decode(frame["data"], validate=True), content)

    def test_an_edit_names_the_message(self):
        target = "6c84fb90-12c4-41e1-840d-7b25c5ee7750"
        text, _ = self.to_both("edit", {"message_id": target, "text": "newer"})
        frame = self.assert_keys(text, "type", "id", "text", "timestamp")
        self.assertEqual((frame["type"], frame["id"], frame["text"]), ("edit", target, "newer"))

    def test_typing(self):
        text, _ = self.to_both("typing", {"active": True})
        self.assertEqual(text, '{"type":"typing","active":true}')

    def test_nobody_there_is_not_an_error(self):
        answer = self.gateway.api("send", {"channel_id": "webchat:nobody-ever", "text": "x"})
        self.assertTrue(UUID.fullmatch(answer["id"]))
        self.assertIs(answer["delivered"], False)
        self.assertEqual(answer["tabs"], 0)

    def test_the_end_of_a_stream_that_nobody_holds_is_not_an_error(self):
        self.assertIs(self.gateway.api("end", {"channel_id": "sse:nobody", "reason": "stop"})["delivered"], False)

    def test_only_the_addressed_tabs_get_a_frame(self):
        mine, other = self.tab(), self.tab(f"{self.user}-other")
        self.gateway.api("send", {"channel_id": self.user, "text": "mine"})
        self.gateway.api("send", {"channel_id": f"{self.user}-other", "text": "other's"})
        self.assertEqual(mine.frame()["text"], "mine")
        self.assertEqual(other.frame()["text"], "other's")

    def test_concurrent_publishers_have_one_order_in_all_tabs(self):
        tabs = self.tabs(3)
        publishers, each = 4, 40
        failures = queue.SimpleQueue()

        def publish(who):
            try:
                for number in range(each):
                    self.gateway.api("send", {"channel_id": self.user, "text": f"{who} {number}"})
            except Exception as error:  # noqa: BLE001, told to the test
                failures.put(error)

        threads = [threading.Thread(target=publish, args=(who,)) for who in range(publishers)]
        for thread in threads:
            thread.start()
        orders = [[tab.frame()["text"] for _ in range(publishers * each)] for tab in tabs]
        for thread in threads:
            thread.join()
        self.assertTrue(failures.empty())
        self.assertEqual(orders[0], orders[1])
        self.assertEqual(orders[0], orders[2])
        for who in range(publishers):
            mine = [int(text.split()[1]) for text in orders[0] if text.startswith(f"{who} ")]
            self.assertEqual(mine, list(range(each)))

    def test_a_batch_is_answered_line_by_line_in_order(self):
        tab = self.tab()
        lines = [{"op": "send", "channel_id": self.user, "text": str(number)} for number in range(50)]
        lines[20] = {"op": "send", "channel_id": "", "text": "refused"}
        lines[21] = {"op": "typing", "channel_id": self.user, "active": True}
        lines[22] = {"op": "nonsense"}
        body = "".join(json.dumps(line) + "\n" for line in lines).encode()
        answer = self.gateway.http("POST", "/api/batch", body, {"Content-Type": "application/x-ndjson"})
        self.assertEqual(answer.status, 200, answer.body[:300])
        answers = [json.loads(line) for line in answer.body.splitlines()]
        self.assertEqual(len(answers), len(lines))
        for number, line in enumerate(answers):
            self.assertEqual("error" in line, number in (20, 22), line)
        texts = [frame["text"] for frame in tab.until(lambda frame: frame.get("text") == "49") if frame["type"] == "message"]
        self.assertEqual(texts, [str(number) for number in range(50) if number not in (20, 21, 22)])
        sent = [line["id"] for number, line in enumerate(answers) if number not in (20, 21, 22)]
        self.assertEqual(len(set(sent)), len(sent))

    def test_an_idempotency_key_makes_a_repeat_answer_as_the_first_did(self):
        tab = self.tab()
        answers = [self.gateway.api("send", {"channel_id": self.user, "text": "once"}, Idempotency_Key=f"key-{self.user}") for _ in range(3)]
        self.gateway.api("send", {"channel_id": self.user, "text": "last"})
        self.assertEqual(answers[0], answers[1])
        self.assertEqual(answers[0], answers[2])
        self.assertEqual([frame["text"] for frame in tab.until(lambda frame: frame["text"] == "last")], ["once", "last"])


class WhoIsThere(GatewayTest):
    def test_users_and_their_tabs(self):
        tabs = self.tabs(2)
        users = self.gateway.http("GET", "/api/users").json()["users"]
        self.assertIn({"user_id": self.user, "tabs": 2}, [{"user_id": user["user_id"], "tabs": user["tabs"]} for user in users])
        begun = time.time()
        query = urllib.parse.urlencode({"user": self.user, "name": "Ann É", "avatar": "https://a.example/é.png"})
        tabs.append(Tab(self.gateway, path=f"/ws?{query}"))
        self.addCleanup(tabs[-1].close)
        one = self.gateway.http("GET", f"/api/users/{self.user}")
        self.assertEqual(one.status, 200, one.body)
        user = one.json()
        self.assertEqual((user["user_id"], user["online"]), (self.user, True))
        # In the order in which they came; without an avatar it is empty.
        named = [(session["user_name"], session["avatar"]) for session in user["sessions"]]
        self.assertEqual(named, [(self.user, "")] * 2 + [("Ann É", "https://a.example/é.png")])
        times = [session["connected_at"] for session in user["sessions"]]
        self.assertEqual(times, sorted(times))
        # Unix seconds, as one clock tells them to both of us.
        self.assertTrue(all(isinstance(seconds, (int, float)) for seconds in times), times)
        self.assertTrue(begun - 60 < times[0] and begun - 1 <= times[2] <= time.time() + 1, (times, begun))
        for tab in tabs:
            tab.close()

    def test_a_cut_user_is_told_4010(self):
        tabs = self.tabs(2)
        answer = self.gateway.http("DELETE", f"/api/users/{self.user}")
        self.assertIn(answer.status, (200, 204), answer.body)
        for tab in tabs:
            (code, reason), _ = tab.closed()
            self.assertEqual((code, reason), (4010, "kicked"))
        self.tab()  # may come back when it asks


class WhatTabsSend(GatewayTest):
    def test_hello_only_when_asked(self):
        hello = self.tab(hello=True).frame()
        self.assertEqual(list(hello), ["type", "session", "server_time", "limits"])
        self.assertEqual(hello["type"], "hello")
        self.assertGreater(hello["limits"]["message_bytes_max"], 0)
        self.assertGreater(hello["limits"]["attachment_bytes_max"], 0)
        quiet = self.tab()
        quiet.send({"type": "ping"})
        self.assertEqual(quiet.frame()["type"], "pong")

    def test_a_ping_of_ours_and_one_of_the_protocol(self):
        tab = self.tab()
        tab.send({"type": "ping", "client_id": "p1"})
        self.assertEqual(tab.frame(), {"type": "pong", "client_id": "p1"})
        self.assertTrue(tab.socket.ping(b"payload").wait(PATIENCE), "the pong of RFC 6455")

    def test_the_ack_comes_before_the_echo_and_names_it(self):
        mine, other = self.tabs(2)
        mine.send({"type": "message", "text": "hi ü", "client_id": "c1"})
        seen = mine.until(lambda frame: frame["type"] == "message" and frame["sender"] == self.user)
        ack = next(frame for frame in seen if frame["type"] == "ack")
        self.assertEqual((ack["client_id"], ack["id"]), ("c1", seen[-1]["id"]))
        self.assertEqual(list(seen[-1]), ["type", "id", "text", "sender", "timestamp"])
        self.assertEqual(other.find("message", sender=self.user)["id"], ack["id"])

    def test_the_same_client_id_is_taken_once(self):
        tab = self.tab()
        first = tab.ask(type="message", text="only once", client_id="same")
        again = tab.ask(type="message", text="only once", client_id="same")
        elsewhere = self.tab().ask(type="message", text="only once", client_id="same")
        self.assertEqual({first["id"], again["id"], elsewhere["id"]}, {first["id"]})
        last = tab.ask(type="message", text="last")
        seen = tab.until(lambda frame: frame["type"] == "message" and frame["id"] == last["id"])
        self.assertNotIn(first["id"], [frame["id"] for frame in seen if frame["type"] == "message"], "its echo came before the second ack")

    def test_the_worker_answers_in_both_tabs_with_typing_and_edits(self):
        tabs = self.tabs(2)
        tabs[0].send({"type": "message", "text": "are you there?", "client_id": "q"})
        for tab in tabs:
            seen = tab.until(lambda frame: frame == {"type": "typing", "active": False})
            self.assertIn({"type": "typing", "active": True}, seen)
            [answer] = [frame for frame in seen if frame["type"] == "message" and frame["sender"] == "star"]
            edits = [frame for frame in seen if frame["type"] == "edit" and frame["id"] == answer["id"]]
            self.assertTrue(edits)
            self.assertIn("are you there?", edits[-1]["text"])

    def test_a_button_press_is_acked_and_answered(self):
        tab = self.tab()
        tab.send({"type": "message", "text": "/buttons"})
        shown = tab.until(lambda frame: frame.get("buttons"))[-1]
        button = next(button for button in shown["buttons"] if button["custom_id"] and not button.get("disabled") and not button.get("url"))
        self.assertEqual(tab.ask(type="button", message_id=shown["id"], custom_id=button["custom_id"])["type"], "ack")
        tab.until(lambda frame: frame["type"] in ("message", "edit") and frame.get("id") != shown["id"])

    def test_rooms_are_joined_and_left(self):
        room = f"den-{self.user}"
        inside, outside = self.tab(), self.tab(f"{self.user}-b")
        self.assertIs(self.gateway.api("send", {"channel_id": f"room:{room}", "text": "x"})["delivered"], False)
        self.assertEqual(inside.ask(type="join", room=room)["type"], "ack")
        answer = self.gateway.api("send", {"channel_id": f"room:{room}", "text": "to the room"})
        self.assertEqual((answer["delivered"], answer["tabs"]), (True, 1))
        self.assertEqual(inside.frame()["text"], "to the room")
        self.assertEqual(outside.ask(type="join", room=room)["type"], "ack")
        outside.send({"type": "message", "text": "hello all", "room": room})
        self.assertEqual(inside.find("message", text="hello all")["sender"], f"{self.user}-b")
        self.assertEqual(inside.ask(type="leave", room=room)["type"], "ack")
        self.assertEqual(self.gateway.api("send", {"channel_id": f"room:{room}", "text": "after"})["tabs"], 1)
        self.gateway.api("send", {"channel_id": self.user, "text": "direct"})
        texts = [frame.get("text") for frame in inside.until(lambda frame: frame.get("text") == "direct")]
        self.assertNotIn("after", texts)


class Webhook(http.server.ThreadingHTTPServer):
    """A worker that refuses each first attempt, to see that order survives."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), WebhookHandler)
        self.got = queue.SimpleQueue()
        self.refuse = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()


class WebhookHandler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        refuse, self.server.refuse = self.server.refuse > 0, self.server.refuse - 1
        # Before the answer: the next request may come over another connection, to another thread.
        if not refuse:
            self.server.got.put((self.headers, body))
        self.send_response(503 if refuse else 204)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


class TheWebhookWorker(unittest.TestCase):
    def setUp(self):
        self.webhook = Webhook()
        self.addCleanup(self.webhook.server_close)
        self.addCleanup(self.webhook.shutdown)
        url = f"http://127.0.0.1:{self.webhook.server_address[1]}/inbound"
        self.gateway = Gateway(worker="webhook", webhook_url=url, webhook_secret="hush", webhook_backoff_min="50ms", webhook_backoff_max="200ms")
        self.addCleanup(self.gateway.stop)
        self.tab = self.gateway.tab("wanda", name="Wanda W.")
        self.addCleanup(self.tab.close)

    def got(self):
        return self.webhook.got.get(timeout=PATIENCE)

    def test_gets_the_message_with_the_session_s_identity_signed(self):
        ack = self.tab.ask(type="message", text="hi", user_id="mallory", sender="mallory", attachments=[{"filename": "a.png", "mimetype": "image/png", "data": base64.b64encode(PIXEL).decode()}])
        headers, body = self.got()
        message = json.loads(body)
        self.assertEqual((message["platform"], message["channel_id"], message["user_id"], message["display_name"]), ("webchat", "webchat:wanda", "wanda", "Wanda W."))
        self.assertEqual((message["content"], message["message_id"], message["is_addressed"]), ("hi", ack["id"], True))
        self.assertEqual(message["attachments"][0]["filename"], "a.png")
        stamp = headers["X-Tabcast-Timestamp"]
        self.assertTrue(stamp)
        expected = hmac.new(b"hush", f"{stamp}.".encode() + body, hashlib.sha256).hexdigest()
        self.assertEqual(headers["X-Tabcast-Signature"].removeprefix("sha256="), expected)

    def test_keeps_the_order_across_retries_and_takes_a_client_id_once(self):
        self.webhook.refuse = 3
        for number in range(10):
            self.tab.ask(type="message", text=str(number), client_id=f"n{number}")
            self.tab.ask(type="message", text=str(number), client_id=f"n{number}")
        self.tab.ask(type="message", text="end")
        texts = []
        while not texts or texts[-1] != "end":
            texts.append(json.loads(self.got()[1])["content"])
        self.assertEqual(texts, [*map(str, range(10)), "end"])


class SlowWorker(http.server.ThreadingHTTPServer):
    """A worker that thinks until it is told to answer, and answers by /api/send."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), SlowWorkerHandler)
        self.asked = queue.SimpleQueue()
        self.think = threading.Event()
        self.answers = queue.SimpleQueue()
        self.gateway = None
        threading.Thread(target=self.serve_forever, daemon=True).start()


class SlowWorkerHandler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.put(message["content"])
        self.server.think.wait(PATIENCE)
        try:
            self.server.answers.put(self.server.gateway.api("send", {"channel_id": message["channel_id"], "text": "answer"}))
        except OSError as error:
            self.server.answers.put(error)
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


class ADrainWithAWebhook(unittest.TestCase):
    def test_waits_for_what_the_worker_was_given_and_lets_it_answer(self):
        worker = SlowWorker()
        self.addCleanup(worker.server_close)
        self.addCleanup(worker.shutdown)
        gateway = Gateway(worker="webhook", webhook_url=f"http://127.0.0.1:{worker.server_address[1]}/", drain_spread="1s")
        self.addCleanup(gateway.stop)
        worker.gateway = gateway
        tab = gateway.tab("dora")
        self.addCleanup(tab.close)
        tab.ask(type="message", text="before the signal")
        self.assertEqual(worker.asked.get(timeout=PATIENCE), "before the signal")
        gateway.terminate()
        until("it drains", lambda: gateway.http("GET", "/readyz").status == 503)
        worker.think.set()
        self.assertEqual(worker.answers.get(timeout=PATIENCE)["tabs"], 1)
        self.assertEqual(tab.find("message", text="answer")["sender"], "star")
        until("it leaves", lambda: gateway.process.poll() is not None)
        self.assertEqual(gateway.process.returncode, 0)
        self.assertTrue(worker.asked.empty(), "it was asked once")


if __name__ == "__main__":
    unittest.main()
