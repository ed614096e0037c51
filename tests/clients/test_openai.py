"""/v1 as the official Python SDK sees it: streams, whole answers, their ends, and every error."""

import asyncio
import contextlib
import json
import re
import socket
import threading
import unittest

import httpx
import httpx2  # what the SDK is built on
import openai

from gateway import PATIENCE, until
from scripted import OpenAITest, content

ID = re.compile(r"chatcmpl-[0-9a-f]{32}")
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40


class Streams(OpenAITest):
    def test_the_models_are_those_of_the_setting(self):
        client = self.client()
        [model] = client.models.list().data
        self.assertEqual((model.id, model.object, model.owned_by), ("tabcast", "model", "tabcast"))
        self.assertEqual(client.models.retrieve("tabcast"), model)

    def test_what_the_worker_is_asked(self):
        messages = [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "what is"}, {"type": "image_url", "image_url": {"url": "data:,"}}, {"type": "text", "text": "this? 🌟"}]},
            {"role": "assistant", "content": None, "tool_calls": []},
        ]
        with self.client().chat.completions.create(model="any name", messages=messages, stream=True, temperature=0.5, stop=["x"], max_tokens=7, extra_body={"odd": {"key": 1}}) as stream:
            turn = self.worker.question()
            turn.say("ok")
            self.assertEqual({chunk.model for chunk in stream}, {"any name"})
        message = turn.message
        self.assertEqual((message["content"], message["user_id"], message["platform"]), ("what is\nthis? 🌟", "developer", "webchat"))
        self.assertEqual(message["channel_id"], f"sse:{turn.id}")
        self.assertRegex(turn.id, ID)
        asked = message["extra"]["openai"]
        self.assertEqual((asked["model"], asked["messages"]), ("any name", messages))
        self.assertEqual(asked["params"], {"temperature": 0.5, "stop": ["x"], "max_tokens": 7, "odd": {"key": 1}})

    def test_every_step_is_a_delta_as_soon_as_it_is_made(self):
        response = self.client().chat.completions.with_raw_response.create(model="tabcast", messages=[{"role": "user", "content": "hi"}], stream=True)
        turn = self.worker.question()
        self.assertEqual(response.headers["x-request-id"], turn.id)
        self.assertEqual(response.headers["content-type"], "text/event-stream; charset=utf-8")
        self.assertEqual((response.headers["cache-control"], response.headers["x-accel-buffering"]), ("no-cache", "no"))
        self.assertNotIn("content-encoding", response.headers)
        stream = response.parse()
        chunks = []

        def delta(expected):
            chunks.append(next(stream))
            [choice] = chunks[-1].choices
            self.assertEqual((choice.index, choice.delta.content, choice.finish_reason, choice.logprobs), (0, expected, None, None))
            self.assertEqual(choice.delta.role, "assistant" if len(chunks) == 1 else None)

        delta("")
        message = turn.send("")  # says nothing
        turn.typing()  # a comment
        turn.edit(message, "Grü")
        delta("Grü")
        turn.edit(message, "Grüße, 世界")
        delta("ße, 世界")
        turn.edit(message, "Grüße, 世界 🌟\u2028\x85\x00\"\\\n")
        delta(" 🌟\u2028\x85\x00\"\\\n")
        turn.buttons("Tea?", {"label": "Yes", "custom_id": "y", "emoji": "🫖"}, {"label": "How", "custom_id": "h", "style": "link", "url": "https://example.org/"})
        delta("\n\nTea?\n- 🫖 Yes\n- How (https://example.org/)")
        second = turn.send("second")
        delta("\n\nsecond")
        turn.edit(second, "second!")
        delta("!")
        turn.end()
        chunks.append(next(stream))
        self.assertEqual((chunks[-1].choices[0].delta.model_dump(exclude_unset=True), chunks[-1].choices[0].finish_reason), ({}, "stop"))
        self.assertEqual(list(stream), [])
        for chunk in chunks:
            self.assertEqual((chunk.id, chunk.object, chunk.model, chunk.created), (turn.id, "chat.completion.chunk", "tabcast", chunks[0].created))
            self.assertNotIn("usage", chunk.model_fields_set)

    def test_text_comes_whole_wherever_its_edits_end(self):
        words = 'aé世🌟👩‍👩‍👧e\u0301\u2028\u2029\x85\ufeff\r\n\t\x1f\x7f"\\/<>&\U0010ffff' * 3
        with self.ask(self.client(), stream=True) as stream:
            self.worker.question().say(*[words[:end] for end in range(1, len(words) + 1)])
            self.assertEqual(content(stream), words)

    def test_an_edit_that_takes_something_back_adds_what_differs_at_the_end(self):
        with self.ask(self.client(), stream=True) as stream:
            self.worker.question().say("Hello wor", "Hello there", "Hello th", "Hello you")
            self.assertEqual(content(stream), "Hello woryou")
        with self.ask(self.client(), stream=True) as stream:
            self.worker.question().say("Hello wor", "Hell", "Hello world")
            self.assertEqual(content(stream), "Hello world", "an extension again")

    def test_a_whole_answer_has_the_final_texts(self):
        answering = self.apart(self.ask, self.client(), "four", extra_headers={"x-kept": "1"})
        turn = self.worker.question()
        first = turn.send("draft")
        turn.buttons("Tea?", {"label": "Yes", "custom_id": "y"})
        turn.edit(first, "final ü")
        turn.end()
        answer = answering.result(PATIENCE)
        [choice] = answer.choices
        self.assertEqual((answer.id, answer.object, answer.model), (turn.id, "chat.completion", "tabcast"))
        self.assertEqual((choice.message.role, choice.message.content, choice.finish_reason), ("assistant", "final ü\n\nTea?\n- Yes", "stop"))
        self.assertEqual((answer.usage.prompt_tokens, answer.usage.completion_tokens), (1, 5))
        self.assertEqual(answer._request_id, turn.id)

    def test_usage_comes_last_and_only_when_asked_for(self):
        with self.ask(self.client(), "five!", stream=True, stream_options={"include_usage": True}) as stream:
            self.worker.question().say("ü" * 9)
            chunks = list(stream)
        self.assertEqual([chunk.usage for chunk in chunks[:-1]], [None] * (len(chunks) - 1))
        self.assertTrue(all("usage" in chunk.model_fields_set for chunk in chunks))
        self.assertEqual(chunks[-1].choices, [])
        usage = chunks[-1].usage
        self.assertEqual((usage.prompt_tokens, usage.completion_tokens, usage.total_tokens), (2, 3, 5))
        self.assertEqual(chunks[-2].choices[0].finish_reason, "stop")

    def test_the_sdk_s_own_collector_is_content(self):
        with self.client().chat.completions.stream(model="tabcast", messages=[{"role": "user", "content": "hi"}]) as stream:
            self.worker.question().say("a", "ab", "abc")
            self.assertEqual(stream.get_final_completion().choices[0].message.content, "abc")

    def test_a_file_is_a_link_behind_which_are_its_bytes(self):
        for is_stream in (True, False):
            with self.subTest(stream=is_stream):
                client = self.client()
                ask = lambda: content(self.ask(client, stream=True)) if is_stream else self.ask(client).choices[0].message.content
                asking = self.apart(ask)
                turn = self.worker.question()
                turn.send("look:")
                turn.file("a [b] \\ü\u2028.png", "image/png", PNG)
                turn.file("empty", "text/html", b"")
                turn.end()
                text = asking.result(PATIENCE)
                links = re.findall(r"\[((?:\\.|[^\]\\])*)\]\(([^)\s]+)\)", text)
                self.assertEqual([label for label, _ in links], ["a \\[b\\] \\\\ü .png", "empty"])
                self.assertTrue(text.startswith("look:\n\n["), text)
                self.assertTrue(all(url.startswith(f"{self.gateway.origin}/files/") for _, url in links), links)
                with httpx.Client() as http:
                    picture, page = [http.get(url) for _, url in links]
                    self.assertEqual((picture.status_code, picture.content, picture.headers["content-type"]), (200, PNG, "image/png"))
                    self.assertEqual((page.status_code, page.content), (200, b""))
                    self.assertTrue(page.headers["content-disposition"].startswith("attachment"), "what could run is not shown")
                    part = http.get(links[0][1], headers={"range": "bytes=8-15"})
                    self.assertEqual((part.status_code, part.content), (206, PNG[8:16]))
                    other = http.get(re.sub(r"/files/........", "/files/00000000", links[0][1]))
                    self.assertEqual(other.status_code, 404)

    def test_an_answer_without_a_word_is_empty(self):
        with self.ask(self.client(), stream=True) as stream:
            self.worker.question().end()
            self.assertEqual([chunk.choices[0].finish_reason for chunk in stream], [None, "stop"])
        answering = self.apart(self.ask, self.client())
        self.worker.question().end()
        self.assertEqual(answering.result(PATIENCE).choices[0].message.content, "")

    def test_streams_side_by_side_keep_apart(self):
        def answer(turn):
            text = turn.message["content"]
            turn.say(*[" ".join(f"{text}/{step}" for step in range(end)) for end in range(1, 21)])

        self.worker.answer = answer

        async def all_of_them():
            async with openai.AsyncOpenAI(base_url=f"{self.gateway.origin}/v1", api_key="x", timeout=PATIENCE) as client:

                async def one(number):
                    asked = {"model": "tabcast", "messages": [{"role": "user", "content": f"question-{number}"}]}
                    if number % 4 == 3:
                        answer = await client.chat.completions.create(**asked)
                        return answer.id, answer.choices[0].message.content
                    chunks = [chunk async for chunk in await client.chat.completions.create(**asked, stream=True)]
                    return chunks[0].id, content(chunks)

                return await asyncio.gather(*[one(number) for number in range(20)])

        answers = asyncio.run(all_of_them())
        for number, (_, text) in enumerate(answers):
            self.assertEqual(text, " ".join(f"question-{number}/{step}" for step in range(20)))
        self.assertEqual(len({id for id, _ in answers}), 20)


class Leaving(OpenAITest):
    def test_a_stream_that_is_closed_early_is_cancelled(self):
        stream = self.ask(self.client(), stream=True)
        turn = self.worker.question()
        turn.send("one")
        self.assertEqual([next(stream).choices[0].delta.content for _ in range(2)], ["", "one"])
        stream.close()
        self.until_cancelled(turn)
        self.assertEqual(self.worker.cancelled, [turn.id], "told once")

    def test_a_loop_that_is_broken_off_is_cancelled(self):
        with self.ask(self.client(), stream=True) as stream:
            turn = self.worker.question()
            for _ in stream:
                break
        self.until_cancelled(turn)

    def test_an_async_task_that_is_cancelled_is_cancelled(self):
        async def leave():
            async with openai.AsyncOpenAI(base_url=f"{self.gateway.origin}/v1", api_key="x", timeout=PATIENCE) as client:
                asking = asyncio.create_task(client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}]))
                turn = await asyncio.to_thread(self.worker.question)
                asking.cancel()
                with self.assertRaises(asyncio.CancelledError):
                    await asking
                return turn

        self.until_cancelled(asyncio.run(leave()))

    def test_a_client_s_timeout_ends_the_answer_in_one_piece(self):
        client = self.client(timeout=httpx2.Timeout(PATIENCE, read=0.3), max_retries=0)
        asking = self.apart(self.ask, client)
        turn = self.worker.question()
        with self.assertRaises(openai.APITimeoutError):
            asking.result(PATIENCE)
        self.until_cancelled(turn)

    def test_a_client_s_timeout_ends_the_stream(self):
        client = self.client(timeout=httpx2.Timeout(PATIENCE, read=0.3), max_retries=0)
        stream = self.ask(client, stream=True)
        turn = self.worker.question()
        with self.assertRaises((openai.APITimeoutError, httpx2.ReadTimeout)):
            list(stream)
        stream.close()
        self.until_cancelled(turn)

    def test_the_sdk_s_retry_after_its_own_timeout_asks_anew(self):
        client = self.client(timeout=httpx2.Timeout(PATIENCE, read=1.0), max_retries=1)
        asking = self.apart(self.ask, client)
        first = self.worker.question()
        second = self.worker.question()
        second.say("the second time")
        self.assertEqual(asking.result(PATIENCE).choices[0].message.content, "the second time")
        self.until_cancelled(first)

    def test_an_answer_that_has_ended_is_not_cancelled_too(self):
        with self.ask(self.client(), stream=True) as stream:
            done = self.worker.question()
            done.say("x")
            list(stream)
        stream = self.ask(self.client(), stream=True)
        left = self.worker.question()
        stream.close()
        self.until_cancelled(left)
        self.assertNotIn(done.id, self.worker.cancelled)


class Errors(OpenAITest):
    settings = {"answers_per_user_max": 3}

    def refused(self, error, status, kind, code, param=None):
        """What every refusal has, as the SDK's fields."""
        self.assertEqual((error.status_code, error.type, error.code, error.param), (status, kind, code, param), error.body)
        self.assertTrue(error.body["message"])
        self.assertEqual(list(error.body), ["message", "type", "param", "code"])
        return error

    def test_400(self):
        client = self.client()
        wrong = [("messages", []), ("messages[0].role", [{"role": "nobody", "content": "x"}]), ("n", 2), ("stream_options", "x")]
        for param, value in wrong:
            with self.subTest(param, value=value), self.assertRaises(openai.BadRequestError) as caught:
                self.ask(client, extra_body={param.split("[")[0]: value})
            self.refused(caught.exception, 400, "invalid_request_error", None, param)
        self.assertEqual(self.worker.asked, 0)

    def test_404(self):
        client = self.client()
        for call in (lambda: client.models.retrieve("gpt-5"), lambda: client.embeddings.create(model="x", input="y"), lambda: client.get("/nothing", cast_to=object)):
            with self.assertRaises(openai.NotFoundError) as caught:
                call()
            self.refused(caught.exception, 404, "invalid_request_error", "not_found")

    def test_405_and_413_are_told_in_the_same_shape(self):
        with self.assertRaises(openai.APIStatusError) as caught:
            self.client().get("/chat/completions", cast_to=object)
        self.refused(caught.exception, 405, "invalid_request_error", "method_not_allowed")
        with self.assertRaises(openai.APIStatusError) as caught:
            self.ask(self.client(), "x" * (9 << 20))
        self.refused(caught.exception, 413, "invalid_request_error", "too_large")

    def test_409_names_the_answer_and_is_not_tried_again(self):
        client = self.client()
        keyed = {"extra_headers": {"Idempotency-Key": f"key-{self.user}"}}
        with self.ask(client, stream=True, **keyed) as stream:
            turn = self.worker.question()
            with self.assertRaises(openai.ConflictError) as caught:
                self.ask(client, **keyed)
            error = self.refused(caught.exception, 409, "invalid_request_error", "conflict")
            self.assertEqual((error.request_id, error.response.headers["x-should-retry"]), (turn.id, "false"))
            turn.say("x")
            self.assertEqual(content(stream), "x")
        self.assertEqual(self.worker.asked, 1)

    def test_429_until_there_is_room(self):
        client = self.client()
        streams = [self.ask(client, stream=True) for _ in range(3)]
        turns = [self.worker.question() for _ in streams]
        with self.assertRaises(openai.RateLimitError) as caught:
            self.ask(client.with_options(max_retries=0))
        error = self.refused(caught.exception, 429, "rate_limit_error", "too_many_answers")
        self.assertNotIn("x-should-retry", error.response.headers, "nothing was asked: it may try again")
        self.assertGreaterEqual(int(error.response.headers["retry-after"]), 1)
        waiting = self.apart(self.ask, client)
        turns[0].say("done")
        self.worker.question().say("after a retry of the SDK's own")
        self.assertEqual(waiting.result(PATIENCE).choices[0].message.content, "after a retry of the SDK's own")
        for stream in streams:
            stream.close()
        for turn in turns[1:]:
            self.until_cancelled(turn)

    def test_500_is_the_worker_s_and_is_not_tried_again(self):
        for reason, status, code in [("error", 500, "worker_error"), ("timeout", 504, "timeout"), ("cancelled", 503, "cancelled")]:
            with self.subTest(reason):
                before = self.worker.asked
                asking = self.apart(self.ask, self.client())  # with the SDK's retries
                turn = self.worker.question()
                turn.say("half of", "half of it", reason=reason)
                with self.assertRaises(openai.InternalServerError) as caught:
                    asking.result(PATIENCE)
                error = self.refused(caught.exception, status, "server_error", code)
                self.assertEqual((error.request_id, error.response.headers["x-should-retry"]), (turn.id, "false"))
                self.assertEqual(self.worker.asked, before + 1)

    def test_an_error_in_a_stream_is_its_last_word(self):
        for reason, code in [("error", "worker_error"), ("timeout", "timeout"), ("cancelled", "cancelled")]:
            with self.subTest(reason):
                stream = self.ask(self.client(), stream=True)
                self.worker.question().say("half", reason=reason)
                chunks = []
                with self.assertRaises(openai.APIError) as caught:
                    collect(stream, chunks)
                self.assertEqual(content(chunks), "half")
                self.assertEqual((caught.exception.code, caught.exception.type, caught.exception.param), (code, "server_error", None))
                self.assertEqual(list(stream), [], "then it is over")

    def test_a_refused_key_of_idempotency_is_free_again(self):
        client = self.client(max_retries=0)
        keyed = {"extra_headers": {"Idempotency-Key": f"key-{self.user}"}}
        with self.assertRaises(openai.BadRequestError):
            self.ask(client, extra_body={"n": 7}, **keyed)
        asking = self.apart(self.ask, client, **keyed)
        self.worker.question().say("x")
        self.assertEqual(asking.result(PATIENCE).choices[0].message.content, "x")


def collect(stream, chunks):
    """So that what came before an error is there after it."""
    for chunk in stream:
        chunks.append(chunk)


class AFullWorker(OpenAITest):
    settings = {"worker_queue_max": 1}

    def test_503_is_tried_again_by_the_sdk_as_nothing_was_asked(self):
        client = self.client()
        self.worker.takes.clear()
        stream = self.ask(client, "the first", stream=True)
        for is_stream in (False, True):
            with self.assertRaises(openai.InternalServerError) as caught:
                self.ask(client.with_options(max_retries=0), "refused", stream=is_stream)
            error = caught.exception
            self.assertEqual((error.status_code, error.type, error.code), (503, "server_error", "overloaded"))
            self.assertNotIn("x-should-retry", error.response.headers)
            self.assertGreaterEqual(int(error.response.headers["retry-after"]), 1)
        waiting = self.apart(self.ask, client, "the second")
        self.worker.takes.set()
        first, second = self.worker.question(), self.worker.question()
        self.assertEqual([turn.message["content"] for turn in (first, second)], ["the first", "the second"])
        first.say("1")
        second.say("2")
        self.assertEqual((content(stream), waiting.result(PATIENCE).choices[0].message.content), ("1", "2"))


class ASlowWorker(OpenAITest):
    settings = {"answer_timeout": "1s"}

    def test_504_is_not_tried_again(self):
        asking = self.apart(self.ask, self.client())
        turn = self.worker.question()
        with self.assertRaises(openai.InternalServerError) as caught:
            asking.result(PATIENCE)
        error = caught.exception
        self.assertEqual((error.status_code, error.code, error.type), (504, "timeout", "server_error"))
        self.assertEqual((error.request_id, error.response.headers["x-should-retry"]), (turn.id, "false"))
        self.until_cancelled(turn)
        self.assertEqual(self.worker.asked, 1)

    def test_a_stream_ends_with_an_error_after_what_was_said(self):
        stream = self.ask(self.client(), stream=True)
        turn = self.worker.question()
        turn.send("and then")
        chunks = []
        with self.assertRaises(openai.APIError) as caught:
            collect(stream, chunks)
        self.assertEqual((content(chunks), caught.exception.code), ("and then", "timeout"))
        self.until_cancelled(turn)

    def test_a_worker_that_says_anything_has_its_time_again(self):
        stream = self.ask(self.client(), stream=True)
        turn = self.worker.question()
        message = turn.send("0")
        for step in range(1, 8):
            threading.Event().wait(0.4)  # three times its time in all
            turn.typing() if step % 2 else turn.edit(message, "0" * (step + 1))
        turn.end()
        self.assertEqual(content(stream), "0" * 7)


class ADrain(OpenAITest):
    settings = {"drain_deadline": "4s", "drain_spread": "1s", "close_timeout": "1s"}

    @classmethod
    def tearDownClass(cls):
        cls.gateway.stop()

    def test_answers_may_end_and_new_ones_are_told_to_try_elsewhere(self):
        client = self.client(max_retries=0)
        client.models.list()  # a connection that is kept
        finished, unfinished = self.ask(self.client(), stream=True), self.ask(self.client(), stream=True)
        turns = [self.worker.question() for _ in range(2)]
        turns[1].send("half")
        whole = self.apart(self.ask, self.client())
        self.worker.question()
        self.gateway.terminate()
        until("it drains", lambda: self.gateway.http("GET", "/readyz").status == 503)
        with self.assertRaises(openai.InternalServerError) as caught:
            self.ask(client)
        error = caught.exception
        self.assertEqual((error.status_code, error.code, error.response.headers["retry-after"]), (503, "draining", "1"))
        turns[0].say("all", "all of it")
        self.assertEqual(content(finished), "all of it", "the worker has time to end what it began")
        chunks = []
        with self.assertRaises(openai.APIError) as caught:
            collect(unfinished, chunks)
        self.assertEqual((content(chunks), caught.exception.code), ("half", "cancelled"))
        with self.assertRaises(openai.InternalServerError) as caught:
            whole.result(PATIENCE)
        self.assertEqual((caught.exception.status_code, caught.exception.response.headers["x-should-retry"]), (503, "false"))
        self.assertEqual(self.worker.asked, 3, "not asked again")
        self.assertEqual(self.gateway.process.wait(PATIENCE), 0, self.gateway.log_text())
        self.assertIn(turns[1].id, self.worker.cancelled, "the worker is told, before the process leaves")


class WholeAnswers(OpenAITest):
    """What answers without `stream` hold, each and together."""

    settings = {"whole_answer_bytes_max": "64KiB", "whole_answers_bytes_max": "80KiB", "message_bytes_max": "1MiB"}

    def failed(self, asking, status, code):
        with self.assertRaises(openai.InternalServerError) as caught:
            asking.result(PATIENCE)
        error = caught.exception
        self.assertEqual((error.status_code, error.code, error.type), (status, code, "server_error"))
        return error

    def test_one_that_holds_too_much_is_502_and_a_stream_is_not(self):
        for texts in (["x" * 70_000], ["x" * 30_000] * 3):
            asking = self.apart(self.ask, self.client(max_retries=2))
            turn = self.worker.question()
            for text in texts:
                turn.send(text)
            error = self.failed(asking, 502, "answer_too_large")
            self.assertIn("65536 bytes", error.body["message"])
            self.assertEqual((error.request_id, error.response.headers["x-should-retry"]), (turn.id, "false"))
            self.until_cancelled(turn)
        self.assertEqual(self.worker.asked, 2, "not asked again")
        with self.ask(self.client(), stream=True) as stream:
            self.worker.question().say("x" * 70_000)
            self.assertEqual(len(content(stream)), 70_000)
        # An edit takes the place of what it edits.
        asking = self.apart(self.ask, self.client())
        self.worker.question().say(*["x" * length for length in range(10_000, 60_000, 5_000)])
        self.assertEqual(len(asking.result(PATIENCE).choices[0].message.content), 55_000)

    def test_all_together_hold_no_more_than_they_may(self):
        before = self.refusals("whole_answers")
        asked = []
        for _ in range(2):
            asking = self.apart(self.ask, self.client(max_retries=2))
            asked.append((asking, self.worker.question()))
        for _, turn in asked:
            turn.send("x" * 50_000)
        # Whoever is heard second is refused.
        until("there is no room for both", lambda: any(asking.done() for asking, _ in asked))
        (refused, other), (kept, turn) = sorted(asked, key=lambda one: not one[0].done())
        error = self.failed(refused, 503, "overloaded")
        self.assertEqual((error.response.headers["retry-after"], error.response.headers["x-should-retry"]), ("1", "false"))
        self.until_cancelled(other)
        turn.end()
        self.assertEqual(len(kept.result(PATIENCE).choices[0].message.content), 50_000)
        self.assertEqual((self.worker.asked, self.refusals("whole_answers") - before), (2, 1))
        again = self.apart(self.ask, self.client())
        self.worker.question().say("x" * 50_000)
        self.assertEqual(len(again.result(PATIENCE).choices[0].message.content), 50_000, "there is room again")


class AnswersThatNobodyTakes(OpenAITest):
    settings = {"whole_answer_bytes_max": "2MiB", "whole_answers_bytes_max": "4MiB", "message_bytes_max": "4MiB"}

    def test_who_takes_nothing_of_an_answer_leaves_room_for_who_does(self):
        text = "x" * 1_200_000
        before = self.refusals("whole_answers")
        body = json.dumps({"model": "tabcast", "messages": [{"role": "user", "content": "hi"}]})
        readers = []
        for _ in range(3):
            reader = socket.socket()
            self.addCleanup(reader.close)
            reader.settimeout(PATIENCE)
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect(("127.0.0.1", self.gateway.port))
            reader.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            self.worker.question().say(text)
            self.assertEqual(reader.recv(12), b"HTTP/1.1 200")
            readers.append(reader)
        # The three hold most of the room, and take none of it.
        asking = self.apart(self.ask, self.client(max_retries=0))
        self.worker.question().say(text)
        self.assertEqual(asking.result(PATIENCE).choices[0].message.content, text)
        self.assertEqual(self.refusals("whole_answers") - before, 0)
        # Whose was the oldest gets no more of it than was on its way.
        taken = 0
        with contextlib.suppress(ConnectionResetError):
            while part := readers[0].recv(1 << 16):
                taken += len(part)
        self.assertLess(taken, len(text))


class NoRoomForAnother(OpenAITest):
    settings = {"whole_answer_bytes_max": "4KiB", "whole_answers_bytes_max": "4KiB"}

    def test_without_any_room_the_worker_is_not_even_asked(self):
        asking = [self.apart(self.ask, self.client(max_retries=0)) for _ in range(4)]
        turns = [self.worker.question() for _ in asking]
        with self.assertRaises(openai.InternalServerError) as caught:
            self.ask(self.client(max_retries=0))
        self.assertEqual((caught.exception.status_code, caught.exception.response.headers["retry-after"]), (503, "1"))
        self.assertNotIn("x-should-retry", caught.exception.response.headers)
        self.assertEqual(self.worker.asked, len(turns))
        for turn in turns:
            turn.end()
        for answer in asking:
            self.assertEqual(answer.result(PATIENCE).choices[0].message.content, "")


class TooManyAnswers(OpenAITest):
    settings = {"answers_max": 3, "answers_per_user_max": 2, "openai_keys": "olga:key-of-olga,otto:key-of-otto", "api_keys": "worker-key", "operator_keys": "operator-key"}
    key = "worker-key"

    def refused(self, error, key, status, code, reason):
        before = self.refusals(reason, Authorization="Bearer operator-key")
        for is_stream in (True, False):
            with self.assertRaises(error) as caught:
                self.ask(self.client(key, max_retries=0), stream=is_stream)
            response = caught.exception.response
            self.assertEqual((caught.exception.status_code, caught.exception.code, response.headers["retry-after"]), (status, code, "1"))
            self.assertNotIn("x-should-retry", response.headers)
        self.assertEqual(self.refusals(reason, Authorization="Bearer operator-key") - before, 2)

    def test_are_429_for_one_user_and_503_for_all(self):
        streams = [self.ask(self.client("key-of-olga"), stream=True) for _ in range(2)]
        turns = [self.worker.question() for _ in streams]
        self.refused(openai.RateLimitError, "key-of-olga", 429, "too_many_answers", "answers_of_user")
        whole = self.apart(self.ask, self.client("key-of-otto"))
        turns.append(self.worker.question())
        self.refused(openai.InternalServerError, "key-of-otto", 503, "overloaded", "answers")
        self.assertEqual(self.worker.asked, len(turns), "the worker was not asked")
        for turn in turns:
            turn.say("done")
        self.assertEqual([content(stream) for stream in streams], ["done"] * 2)
        self.assertEqual(whole.result(PATIENCE).choices[0].message.content, "done")
        again = self.apart(self.ask, self.client("key-of-olga"))
        self.worker.question().say("there is room again")
        self.assertEqual(again.result(PATIENCE).choices[0].message.content, "there is room again")


class OneAddress(OpenAITest):
    key = "worker-key"
    settings = {"api_keys": "worker-key", "openai_keys": "olga:key-of-olga,otto:key-of-otto", "tabs_per_address_max": 2}

    def test_has_its_share_of_answers_of_either_kind(self):
        whole = self.apart(self.ask, self.client("key-of-olga"))
        turn = self.worker.question()
        with self.ask(self.client("key-of-otto"), stream=True) as stream:
            other = self.worker.question()
            for is_stream in (False, True):
                with self.assertRaises(openai.RateLimitError) as caught:
                    self.ask(self.client("key-of-otto", max_retries=0), stream=is_stream)
                error = caught.exception
                self.assertEqual((error.status_code, error.code, error.response.headers["retry-after"]), (429, "limit_reached", "5"))
            turn.say("whole")
            self.assertEqual(whole.result(PATIENCE).choices[0].message.content, "whole")
            again = self.apart(self.ask, self.client("key-of-olga", max_retries=5))
            self.worker.question().say("again")
            self.assertEqual(again.result(PATIENCE).choices[0].message.content, "again")
            other.end()
        self.assertEqual(self.worker.asked, 3)


class Keys(OpenAITest):
    key = "worker-key"
    settings = {"api_keys": "worker-key", "operator_keys": "operator-key", "openai_keys": "olga:key-of-olga,otto:key-of-otto"}

    def test_401_and_403(self):
        for key, error, kind in [
            ("nobody's", openai.AuthenticationError, "authentication_error"),
            ("worker-key", openai.PermissionDeniedError, "permission_error"),
            ("operator-key", openai.PermissionDeniedError, "permission_error"),
        ]:
            for name, call in {"models": lambda client: client.models.list(), "whole": self.ask, "stream": lambda client: self.ask(client, stream=True)}.items():
                with self.subTest(f"{key}: {name}"), self.assertRaises(error) as caught:
                    call(self.client(key))
                self.assertEqual(caught.exception.type, kind)
                self.assertEqual(list(caught.exception.body), ["message", "type", "param", "code"])
                if error is openai.AuthenticationError:
                    self.assertEqual(caught.exception.code, "invalid_api_key")
                    self.assertIn("Bearer", caught.exception.response.headers["www-authenticate"])
        self.assertEqual(self.worker.asked, 0)

    def test_the_user_is_the_key_s(self):
        for user in ("olga", "otto"):
            with self.ask(self.client(f"key-of-{user}"), stream=True, user="mallory") as stream:
                turn = self.worker.question()
                self.assertEqual(turn.message["user_id"], user)
                turn.say(f"hello {user}")
                self.assertEqual(content(stream), f"hello {user}")

    def test_an_answer_is_found_again_by_its_user_only(self):
        stream = self.ask(self.client("key-of-olga"), stream=True, extra_headers={"x-tabcast-detach": "true"})
        turn = self.worker.question()
        stream.close()
        answer, events = f"/v1/chat/completions/{turn.id}", f"/v1/chat/completions/{turn.id}/events"
        for method, path in [("GET", events), ("DELETE", answer)]:
            foreign = self.gateway.http(method, path, headers={"Authorization": "Bearer key-of-otto"})
            self.assertEqual((foreign.status, foreign.json()["error"]["code"]), (404, "not_found"))
        self.assertEqual(self.worker.cancelled, [])
        self.assertIs(turn.call("send", text="still here")["delivered"], True)
        own = self.gateway.http("DELETE", answer, headers={"Authorization": "Bearer key-of-olga"})
        self.assertEqual((own.status, own.json()), (200, {"id": turn.id, "object": "chat.completion", "cancelled": True}))
        self.until_cancelled(turn)

    def test_keys_of_idempotency_are_each_user_s_own(self):
        keyed = {"extra_headers": {"Idempotency-Key": "the same"}, "stream": True}
        streams = [self.ask(self.client(f"key-of-{user}"), **keyed) for user in ("olga", "otto")]
        for _ in streams:
            self.worker.question().say("x")
        self.assertEqual([content(stream) for stream in streams], ["x", "x"])


class Detached(OpenAITest):
    DETACH = {"extra_headers": {"x-tabcast-detach": "true"}}

    def attach(self, turn):
        """The answer from its beginning, as the SDK reads a stream."""
        response = self.client().get(f"/chat/completions/{turn.id}/events", cast_to=openai.types.chat.ChatCompletionChunk, stream=True, stream_cls=openai.Stream[openai.types.chat.ChatCompletionChunk])
        self.addCleanup(response.close)
        return response

    def test_goes_on_without_its_reader_and_is_replayed_and_then_live(self):
        stream = self.ask(self.client(), stream=True, **self.DETACH)
        turn = self.worker.question()
        message = turn.send("before")
        self.assertEqual([next(stream).choices[0].delta.content for _ in range(2)], ["", "before"])
        stream.close()
        self.assertIs(turn.edit(message, "before, meanwhile")["delivered"], True)
        again = self.attach(turn)
        chunks = [next(again), next(again)]
        while content(chunks) != "before, meanwhile":
            chunks.append(next(again))
        turn.edit(message, "before, meanwhile, live")
        chunks.append(next(again))
        self.assertEqual(chunks[-1].choices[0].delta.content, ", live")
        turn.end()
        chunks.extend(again)
        self.assertEqual(content(chunks), "before, meanwhile, live")
        self.assertEqual((chunks[0].choices[0].delta.role, chunks[-1].choices[0].finish_reason), ("assistant", "stop"))
        self.assertEqual({chunk.id for chunk in chunks}, {turn.id})
        self.assertEqual(self.worker.cancelled, [])

    def test_is_found_again_after_its_end(self):
        stream = self.ask(self.client(), stream=True, stream_options={"include_usage": True}, **self.DETACH)
        turn = self.worker.question()
        stream.close()
        message = turn.send("one")
        turn.file("f.txt", "text/plain", b"content")
        turn.edit(message, "one, edited")
        turn.end()
        wire = self.gateway.http("GET", f"/v1/chat/completions/{turn.id}/events")
        self.assertEqual((wire.status, wire.headers["x-request-id"]), (200, turn.id))
        self.assertTrue(wire.body.endswith(b"data: [DONE]\n\n"), wire.body[-200:])
        for _ in range(2):
            chunks = list(self.attach(turn))
            self.assertRegex(content(chunks), r"^one\n\n\[f\.txt\]\(http://[^)]*\)\n\n, edited$")
            self.assertEqual(chunks[-1].usage.total_tokens, chunks[-1].usage.prompt_tokens + chunks[-1].usage.completion_tokens)

    def test_a_second_reader_takes_it_over(self):
        first = self.ask(self.client(), stream=True, **self.DETACH)
        turn = self.worker.question()
        turn.send("x")
        second = self.attach(turn)
        self.assertEqual([next(second).choices[0].delta.content for _ in range(2)], ["", "x"])
        with self.assertRaises(openai.APIError) as caught:
            list(first)
        self.assertEqual(caught.exception.code, "cancelled")
        turn.end()
        self.assertEqual(list(second)[-1].choices[0].finish_reason, "stop")
        self.assertEqual(self.worker.cancelled, [])

    def test_delete_cancels_what_is_being_read(self):
        stream = self.ask(self.client(), stream=True, **self.DETACH)
        turn = self.worker.question()
        turn.send("x")
        answer = self.client().delete(f"/chat/completions/{turn.id}", cast_to=object)
        self.assertEqual(answer, {"id": turn.id, "object": "chat.completion", "cancelled": True})
        with self.assertRaises(openai.APIError) as caught:
            list(stream)
        self.assertEqual(caught.exception.code, "cancelled")
        self.until_cancelled(turn)
        for method, path in [("GET", f"/v1/chat/completions/{turn.id}/events"), ("DELETE", f"/v1/chat/completions/{turn.id}")]:
            self.assertEqual(self.gateway.http(method, path).status, 404)

    def test_a_whole_answer_may_be_left_too(self):
        asking = self.apart(self.ask, self.client(timeout=httpx2.Timeout(PATIENCE, read=0.3), max_retries=0), **self.DETACH)
        turn = self.worker.question()
        with self.assertRaises(openai.APITimeoutError):
            asking.result(PATIENCE)
        turn.say("all", "all of it")
        self.assertEqual(content(self.attach(turn)), "all of it")
        self.assertEqual(self.worker.cancelled, [])

    def test_the_sdk_s_retry_does_not_ask_a_detached_question_twice(self):
        client = self.client(timeout=httpx2.Timeout(PATIENCE, read=0.5), max_retries=2)
        asking = self.apart(self.ask, client, extra_headers={"x-tabcast-detach": "true", "Idempotency-Key": self.user})
        turn = self.worker.question()
        with self.assertRaises(openai.ConflictError) as caught:
            asking.result(PATIENCE)
        self.assertEqual(caught.exception.request_id, turn.id, "where the answer is found")
        turn.say("found")
        self.assertEqual(content(self.attach(turn)), "found")
        self.assertEqual(self.worker.asked, 1)

    def test_what_was_not_detached_is_not_found(self):
        with self.ask(self.client(), stream=True) as stream:
            turn = self.worker.question()
            for id in (turn.id, "chatcmpl-" + "0" * 32, "x", "..", "%00", "a" * 300):
                self.assertEqual(self.gateway.http("GET", f"/v1/chat/completions/{id}/events").status, 404, id)
            turn.say("x")
            self.assertEqual(content(stream), "x", "whoever reads it is not disturbed")


class LongDetached(OpenAITest):
    settings = {"answer_bytes_max": "1KiB"}

    def test_410_where_the_beginning_was_not_kept(self):
        stream = self.ask(self.client(), stream=True, **Detached.DETACH)
        turn = self.worker.question()
        text = ""
        message = turn.send("x")
        for _ in range(8):
            text += "x" * 256
            turn.edit(message, text)
        turn.end()
        self.assertEqual(content(stream), text, "whoever reads on loses nothing")
        with self.assertRaises(openai.APIStatusError) as caught:
            self.client().get(f"/chat/completions/{turn.id}/events", cast_to=object)
        self.assertEqual((caught.exception.status_code, caught.exception.code), (410, "replay_lost"))


class Mirrored(OpenAITest):
    settings = {"mirror_to_tabs": "true"}

    def test_the_user_s_tabs_see_question_and_answer(self):
        tab, other = self.tab("developer"), self.tab()
        with self.ask(self.client(), "what is it?", stream=True) as stream:
            turn = self.worker.question()
            question = tab.find("message")
            self.assertEqual((question["text"], question["sender"]), ("what is it?", "developer"))
            message = turn.send("a")
            turn.typing()
            turn.edit(message, "a tab")
            turn.file("f.txt", "text/plain", b"x")
            turn.end()
            self.assertIn("a tab\n\n[f.txt](", content(stream))
        seen = tab.until(lambda frame: frame["type"] == "file")
        self.assertEqual([(frame["type"], frame.get("text")) for frame in seen], [("message", "a"), ("typing", None), ("edit", "a tab"), ("file", None)])
        self.assertEqual((seen[0]["sender"], seen[0]["id"], seen[2]["id"]), ("star", message, message))
        self.gateway.api("send", {"channel_id": self.user, "text": "for the other"})
        self.assertEqual(other.frame()["text"], "for the other")

    def test_a_whole_answer_is_seen_too_and_no_end(self):
        tab = self.tab("developer")
        asking = self.apart(self.ask, self.client(), "whole?")
        self.worker.question().say("yes")
        asking.result(PATIENCE)
        self.gateway.api("send", {"channel_id": "developer", "text": "last"})
        seen = tab.until(lambda frame: frame.get("text") == "last")
        self.assertEqual([(frame["type"], frame.get("text")) for frame in seen], [("message", "whole?"), ("message", "yes"), ("message", "last")])


if __name__ == "__main__":
    unittest.main()
