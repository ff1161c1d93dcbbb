"""A judge behind HTTP: what is read as a grade, and a loopback server that may do anything."""

import json
import math
import threading
import time
import types
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import FAST

import endpoint
from endpoint import asked_wait, find_key, grade_of, is_local, short, words_of
from engine import UserError
from rewards import build_reward
from runs import read_rows
from train import main

TEXTS = ["the plot was really clever", "dull .", "", "the music felt warm , superb ."]
PROMPTS = ["the hero", "a", "", "the villain was very"]
KEY = "sk-quite/secret+7731="


# ---- reading a grade


@pytest.mark.parametrize(
    "answer, grade",
    [
        ("4", 4),
        (" 4\n", 4),
        ("4.", 4),
        ("2.5", 2.5),
        ("1", 1),
        ("5/5", 5),
        ("4/5", 4),
        ("2.5 of 5", 2.5),
        ("4 / 5.0", 4),
        ("4 (out of 5)", 4),
        ("Grade: 4", 4),
        ("grade 4!", 4),
        ("Rating: 4 out of 5", 4),
        ("Final grade: 3", 3),
        ("**4**", 4),
        ("**Score:** 4", 4),
        ("Score: **4/5**", 4),
        ("**4** out\nof **5**", 4),
        ("[[4]]", 4),
        ('"4"', 4),
        ("```\n4\n```", 4),
        ('{"grade": 4}', 4),
        ('{"grade": 1}', 1),
        ('{"grade": 5}', 5),
        ('{"Score": 4, "reason": "not 5, because 1 of 3 is wrong"}', 4),
        ('```json\n{"rating": 2.5}\n```', 2.5),
        ('{"grade": "4/5"}', 4),
        ('{"score": 4, "max_score": 5}', 4),
        ("<think>Is it a 2? No.</think>\n\n4", 4),
        ("the beginning stood in the prompt: 2? </think>4", 4),
        ("<think>a</think><think>2</think>Grade: 3", 3),
    ],
)
def test_an_answer_that_is_a_grade(answer, grade):
    assert grade_of(answer, top=5) == grade


@pytest.mark.parametrize(
    "answer",
    [
        *["", "excellent!", "four", "0", "9", "6", "5.5", "0.8"],
        *["-3", "\u22123", "- 4", "<4", "~4", "+4"],
        *["8/10", "4/10", "4 out of 10", "80%", "4%", "4/5/2024", "4/.5", "4/0", "4,5", ".5"],
        *["4-5", "3 or 4", "4 5", "4. 5", "3\n4", "1) 4", "4 stars out of 5", "4 because it is so"],
        *["On a scale from 1 to 5 I say 4", "Grade: 4 (of 10)", "Grade: A", "Grade: Grade: 4 4"],
        *["<think>4", "<think> 4", "4<think>", "4</think>", "<think>4</think>"],
        *["```4 5```", "```\n4\n```\n```\n5\n```"],
        *['{"grade": 8}', '{"grade": 4, "score": 2}', '{"grade": 4, "grade": 2}', '{"note": 4}'],
        *['{"score": 4, "out_of": 10}', '{"score": 4, "scale": "1-10"}', '{"grade": "4/10"}'],
        *['{"grade": true}', '{"grade": null}', '{"grade": [4]}', '{"grade": {"value": 4}}', "{}"],
        *['{"grade": NaN}', '{"grade": 1e999}', '{"grade": 1' + "0" * 400 + "}", "[4, 2]"],
        *["{" * 100_000, '{"grade": ' + "[" * 100_000, "4" * 100_000, "4" + " " * 100_000 + "x"],
    ],
    ids=lambda answer: answer[:30],
)
def test_an_answer_that_may_not_be_the_grade(answer):
    assert grade_of(answer, top=5) is None


def test_the_top_decides_what_a_grade_is():
    assert grade_of("8", 9) == 8 and grade_of("8/9", 9) == 8
    assert grade_of("4/5", 9) is None and grade_of('{"score": 4, "out_of": 5}', 9) is None


# ---- a server on the loopback interface


def completion(content, finish_reason="stop", **message):
    choice = {"message": {"content": content, **message}, "finish_reason": finish_reason}
    return json.dumps({"choices": [choice]})


class Handler(BaseHTTPRequestHandler):
    """`server.state.behave(question, nth)` gives the content of a chat completion, or a tuple
    (status, body, headers), or a function of the handler that writes what it likes."""

    def do_GET(self):
        self.note("")
        state = self.server.state
        if isinstance(state.models, list):
            self.write(200, json.dumps({"data": [{"id": name} for name in state.models]}))
        else:
            self.write(*state.models)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        self.note(question, body)
        state = self.server.state
        answer = state.behave(question, state.asked.count(question))
        try:
            if callable(answer):
                answer(self)
            elif isinstance(answer, str):
                self.write(200, completion(answer))
            else:
                self.write(*answer)
        except OSError:
            state.left.set()  # the client has stopped waiting

    def note(self, question, body=None):
        state = self.server.state
        state.requests.append((self.command, self.path, self.headers["Authorization"], body))
        state.asked += [question] if body else []

    def write(self, status, body, headers=()):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def start():
    """Start a server: -> what it does, and what it was asked."""
    running = []

    def start_server(behave=lambda question, nth: "5"):
        http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=http.serve_forever, args=[0.02], daemon=True).start()
        running.append(http)
        http.state = types.SimpleNamespace(
            url=f"http://127.0.0.1:{http.server_port}/v1",
            behave=behave,
            models=["llama-7"],
            asked=[],
            requests=[],
            left=threading.Event(),
        )
        return http.state

    yield start_server
    for http in running:
        http.shutdown()
        http.server_close()


@pytest.fixture
def server(start):
    return start()


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The seconds that the client would have waited; and no key or proxy of this machine."""
    for name in ("OPENAI_API_KEY", "http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    seconds = []
    monkeypatch.setattr(endpoint, "sleep", seconds.append)
    return seconds


def judge(server, **options):
    literals = "".join(f", {name}={value!r}" for name, value in options.items())
    return build_reward(f'judge("{server.url}"{literals})')


def graded_once(server, behave, **options):
    """A judge that has graded one text, and from then on behaves like that."""
    reward = judge(server, **options)
    server.behave = lambda question, nth: "3"
    assert reward(["p"], ["c"]).tolist() == [0.5]
    server.behave = behave
    server.asked.clear()
    return reward


def refusal(server, **options):
    """What the error says where the judge grades nothing."""
    with pytest.raises(UserError) as caught:
        judge(server, **{"retries": 0, **options})(PROMPTS[:2], TEXTS[:2])
    message = str(caught.value)
    assert server.url in message and "\n" not in message and len(message) <= 330
    return message


# ---- questions and answers


def test_grades_are_mapped_to_0_and_1_in_order_and_asked_for_once(server):
    server.behave = lambda question, nth: "Grade: 4" if "clever" in question else "2.5 of 5"
    reward = judge(server, rubric="Is {it} {warm}?", max_tokens=77)
    assert reward(PROMPTS, TEXTS).tolist() == [0.75, 0.375, 0.375, 0.375]
    reward(PROMPTS, TEXTS)
    assert len(server.asked) == 4, "the second time nobody is asked"
    method, path, _, body = server.requests[-1]
    assert (method, path) == ("POST", "/v1/chat/completions")
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("llama-7", 0, 77)
    assert "Is {it} {warm}?" in server.asked[0]
    assert any("the plot was really clever" in question for question in server.asked)


def test_equal_questions_of_a_batch_are_asked_once(server):
    server.behave = lambda question, nth: "4" if "{a}" in question else "2"
    scores = judge(server)(["p"] * 40, ["{a}", "b"] * 20)
    assert scores.tolist() == [0.75, 0.25] * 20 and len(server.asked) == 2


def test_eight_questions_are_on_their_way_together(server):
    together = threading.Barrier(8)

    def wait_for_seven_others(question, nth):
        together.wait(20)  # breaks where fewer come
        return "5"

    server.behave = wait_for_seven_others
    texts = [f"text {i}" for i in range(16)]
    assert judge(server)(["p"] * 16, texts).tolist() == [1.0] * 16
    assert len(server.asked) == 16


@pytest.mark.parametrize(
    "body",
    [
        completion([{"type": "text", "text": "4"}]),
        completion([{"type": "thinking", "thinking": "2?"}, {"type": "text", "text": "4"}]),
        completion("4", reasoning_content="I would say 2."),
        json.dumps({"choices": [{"message": {"content": "4"}}], "error": None}),
    ],
)
def test_the_grade_is_in_the_content(server, body):
    server.behave = lambda question, nth: (200, body)
    assert judge(server)(["p"], ["c"]).tolist() == [0.75]


@pytest.mark.parametrize(
    "answer, reason",
    [
        ("excellent!", "answered 'excellent!', which is no grade from 1 to 5"),
        ("8/10", "answered '8/10', which is no grade from 1 to 5"),
        ("so\ngood " * 99, "answered 'so good so good"),
        ((200, completion(None, reasoning_content="4")), "answered nothing, which is no grade"),
        ((200, completion("", reasoning="4")), "answered nothing, which is no grade from 1 to 5"),
        ((200, completion("<think>Let me", "length")), "cut at max_tokens=1024: thinking needs"),
        ((200, completion("4", "length")), "answered '4', which is no grade from 1 to 5 (cut at"),
        ((200, "[]"), "JSON, but no chat completion"),
        ((200, '{"choices": [{"message": "4"}]}'), "JSON, but no chat completion"),
        ((200, '{"choices": []}'), "JSON, but no chat completion"),
        ((200, "not json\nat all"), "HTTP 200 OK: an answer that is not JSON: not json"),
        ((200, "[" * 100_000), "an answer that is not JSON"),
        ((200, '{"error": {"message": "no more memory"}}'), "an error: no more memory"),
        (
            (404, '{"error": {"message": "model x is\\nnot here"}}'),
            "HTTP 404 Not Found: model x is",
        ),
        ((400, '{"error": "too long"}'), "HTTP 400 Bad Request: too long"),
        ((422, '{"detail": "no messages"}'), "HTTP 422 Unproc"),
        ((500, "\noops\nTraceback"), "HTTP 500 Internal Server Error: oops"),
        ((500, ""), "HTTP 500 Internal Server Error: nothing is said about it"),
        ((503, "[" * 100_000), "HTTP 503 Service Unavailable: [[[["),
        (lambda handler: None, "no answer: Remote end closed connection without response"),
    ],
)
def test_a_judge_that_has_graded_nothing_is_refused_in_its_own_words(server, answer, reason):
    server.behave = lambda question, nth: answer
    message = refusal(server)
    assert "gave no grade to any of 2 texts" in message and reason in message


def test_after_its_first_grade_a_failure_is_no_score(server):
    answers = ["excellent!", (500, "oops"), (200, "not json"), (401, "no"), (200, "[" * 100_000)]
    for answer in answers:
        reward = graded_once(server, lambda question, nth, answer=answer: answer, retries=0)
        scores = reward([*PROMPTS, "p"], [*TEXTS, "c"])
        assert torch.isnan(scores[:4]).all() and scores[4] == 0.5, "what was graded stays"


def test_one_grade_in_the_first_call_is_enough(server):
    server.behave = lambda question, nth: "5" if "clever" in question else (500, "")
    name = f'judge("{server.url}", retries=0)'
    reward = build_reward(f"0.5*{name} + length(target=5)")
    assert torch.isnan(reward(PROMPTS, TEXTS)).tolist() == [False, True, True, True]
    assert list(reward.metrics()) == [f"reward/{name}", "reward/length(target=5)"]
    assert all(math.isfinite(value) for value in reward.metrics().values())


# ---- asked again


def test_a_judge_that_fails_once_is_asked_again(server, waits):
    server.behave = lambda question, nth: "5" if nth == 2 else (500, "")
    assert judge(server)(PROMPTS, TEXTS).tolist() == [1.0] * 4 and waits == [0.5] * 4


@pytest.mark.parametrize(
    "answer",
    [(429, ""), (408, ""), (502, ""), (200, "{"), lambda handler: None, (200, '{"error": "busy"}')],
)
def test_waits_double_while_it_may_get_better(server, waits, answer):
    server.behave = lambda question, nth: answer
    with pytest.raises(UserError, match="gave no grade to the one text"):
        judge(server, retries=4)(["p"], ["c"])
    assert waits == [0.5, 1, 2, 4] and len(server.asked) == 5


@pytest.mark.parametrize(
    "answer", [(400, ""), (401, ""), (403, ""), (404, ""), "excellent!", (200, "[]")]
)
def test_what_will_not_get_better_is_asked_once(server, waits, answer):
    server.behave = lambda question, nth: answer
    refusal(server, retries=4)
    assert waits == [] and len(server.asked) == 2


def test_waits_are_those_that_the_server_asks_for_and_no_longer_than_a_minute(server, waits):
    asked = ["7", "0.25", "0", "86400", formatdate(time.time() + 86400, usegmt=True), "soon"]
    asked.append(formatdate(0, usegmt=True))
    server.behave = lambda question, nth: (
        (429, "", [("Retry-After", asked[nth - 1])]) if nth <= len(asked) else "5"
    )
    assert judge(server, retries=len(asked))(["p"], ["c"]).tolist() == [1.0]
    assert waits == [7, 0.25, 0, 60, 60, 16, 0], "after a word it cannot read, 0.5 doubled 5 times"


def test_a_date_to_wait_for(monkeypatch):
    monkeypatch.setattr(endpoint, "time", lambda: 784111777.0 - 19)
    assert asked_wait("Sun, 06 Nov 1994 08:49:37 GMT") == 19  # the example of RFC 9110
    assert asked_wait(None) is asked_wait("-3") is asked_wait("Sun, 99 Nov 1994") is None


def test_long_waits_do_not_grow(server, waits):
    server.behave = lambda question, nth: (500, "")
    with pytest.raises(UserError):
        judge(server, retries=12)(["p"], ["c"])
    assert waits == [0.5, 1, 2, 4, 8, 16, 32, 60, 60, 60, 60, 60]
    waits.clear()
    with pytest.raises(UserError):
        judge(server)(["p"], ["another"])
    assert waits == [0.5, 1], "twice more, if nothing else is said"


# ---- limits of time and bytes


def drip(before: bytes):
    """Write `before` at once, then a good answer byte by byte, each sooner than a timeout."""

    def answer(handler):
        handler.wfile.write(before)
        body = completion("3").encode()
        slow = b"x" * 60 + b"\r\n\r\n" + body if b"\r\n\r\n" not in before else b" " * 60 + body
        for byte in slow:
            handler.wfile.write(bytes([byte]))
            time.sleep(0.05)

    return answer


@pytest.mark.parametrize(
    "before", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nX-Slow: ", b"HTTP/1.1 200 "]
)
def test_the_time_limit_is_that_of_the_whole_answer(server, before):
    server.behave = lambda question, nth: drip(before)
    assert "no whole answer within 0.4 seconds (timeout=)" in refusal(server, timeout=0.4)
    assert server.left.wait(20), "the connection is closed"


def test_a_silent_server_is_late(server):
    server.behave = lambda question, nth: lambda handler: server.left.wait(20)
    try:
        assert "no whole answer within 0.2 seconds" in refusal(server, timeout=0.2)
    finally:
        server.left.set()


def test_an_endless_answer_is_not_read_to_its_end(server):
    written = []

    def flood(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(400):
            handler.wfile.write(b" " * 250_000)
            written.append(250_000)
        handler.wfile.write(completion("3").encode())

    server.behave = lambda question, nth: flood
    message = refusal(server, retries=3)
    assert "HTTP 200 OK: an answer of more than 1,000,000 bytes" in message
    assert server.left.wait(20) and sum(written) < 100_000_000 and len(server.asked) == 2


# ---- keys


def test_the_key_is_sent_and_never_said(server, monkeypatch, capsys):
    def repeat_it(question, nth):
        return lambda handler: handler.write(401, f"wrong: {handler.headers['Authorization']}")

    server.behave = repeat_it
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    message = refusal(server)
    assert "HTTP 401 Unauthorized: wrong: Bearer ***" in message
    assert {key for _, _, key, _ in server.requests} == {f"Bearer {KEY}"}
    monkeypatch.setenv("MY_KEY", "another")
    server.requests.clear()
    assert "Bearer ***" in refusal(server, key_env="MY_KEY")
    assert {key for _, _, key, _ in server.requests} == {"Bearer another"}
    monkeypatch.setenv("MY_KEY", KEY)
    long = "x" * 60
    server.behave = lambda question, nth: f"{long} {KEY} {KEY}"
    assert "sk-" not in refusal(server, key_env="MY_KEY"), "not its beginning either"
    said = capsys.readouterr()
    assert "sk-" not in message + said.out + said.err


def test_without_a_key_none_is_sent(server):
    judge(server)(["p"], ["c"])
    assert {key for _, _, key, _ in server.requests} == {None}


def test_a_key_that_is_not_there_or_no_key(server, monkeypatch):
    with pytest.raises(UserError, match="the environment variable MY_KEY is not set"):
        judge(server, key_env="MY_KEY")
    for wrong in ("sk-one\nsk-two", "sk-\u20ac"):
        monkeypatch.setenv("MY_KEY", wrong)
        with pytest.raises(UserError, match="MY_KEY holds a space or a letter") as caught:
            judge(server, key_env="MY_KEY")
        assert "sk-" not in str(caught.value)
    assert server.requests == []


def test_a_key_goes_over_plain_http_to_this_machine_alone(monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for url in ("https://judge.example/v1", "http://localhost:8000/v1", "http://[::1]:80/v1"):
        assert find_key(url, None) == KEY and capsys.readouterr().out == ""
    for url in ("http://judge.example/v1", "http://192.168.1.7:8000/v1", "HTTP://a.localhost.b/v1"):
        assert find_key(url, None) is None
        said = capsys.readouterr().out
        assert url in said and 'key_env="OPENAI_API_KEY" sends it' in said and KEY not in said
        assert find_key(url, "OPENAI_API_KEY") == KEY
    assert is_local("http://127.8.9.1/v1") and not is_local("http://128.0.0.1/v1")
    assert is_local("http://0.0.0.0:8000/v1")


def test_no_redirect_is_followed(start, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    other = start()
    for status in (301, 302, 307, 308):
        away = (status, "", [("Location", other.url + "/chat/completions")])
        message = refusal(start(lambda question, nth, away=away: away), retries=3)
        assert f"HTTP {status}" in message and f"the server points to {other.url}" in message
    assert other.requests == []


# ---- the model


def test_the_only_model_of_a_server_is_asked_and_said(server, capsys):
    judge(server)(["p"], ["c"])
    assert server.requests[0][:2] == ("GET", "/v1/models")
    assert server.requests[1][3]["model"] == "llama-7"
    assert "has one model, llama-7, which is asked" in capsys.readouterr().out


def test_a_model_that_is_named_is_asked_without_a_word(server, capsys):
    judge(server, model="qwen-3")(["p"], ["c"])
    assert [(request[0], request[3]["model"]) for request in server.requests] == [
        ("POST", "qwen-3")
    ]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "models, message",
    [
        (["a", "b"], 'has 2 models: a, b; name one: model="..."'),
        ([f"m{i}" for i in range(13)], "13 models: m0, m1, m2, m3, m4, m5, m6, m7, m8, m9 and 3"),
        ([], "the server has no model"),
        ((403, "keep out"), r"\(HTTP 403 Forbidden: keep out\).* names a model without that list"),
        ((200, "[]"), "its answer to GET /models is no list; name the model"),
        ((200, '{"data": [7]}'), "its answer to GET /models is no list; name the model"),
        ((200, "<html>"), "an answer that is not JSON: <html>"),
    ],
)
def test_without_one_model_the_user_must_name_it(server, models, message):
    server.models = models
    with pytest.raises(UserError, match=message):
        judge(server)
    assert server.asked == []


@pytest.mark.parametrize("status", [404, 405, 501])
def test_a_server_without_a_list_of_models_is_asked_for_its_default(server, capsys, status):
    server.models = (status, "nothing here")
    assert judge(server)(["p"], ["c"]).tolist() == [1.0]
    assert [request[0] for request in server.requests] == ["GET", "POST"], "not asked again"
    assert server.requests[1][3]["model"] == "default"
    assert 'has no list of models: it is asked for "default"' in capsys.readouterr().out


def test_a_server_that_is_not_there():
    with pytest.raises(UserError, match=r"models cannot be had \(no .*running"):
        build_reward('judge("http://127.0.0.1:9/v1", retries=0, timeout=1)')
    reward = build_reward('judge("http://127.0.0.1:9/v1", model="m", retries=0, timeout=1)')
    with pytest.raises(UserError, match=r"127.0.0.1:9/v1'\) gave no grade to the one text; .* no "):
        reward(["p"], ["c"])


# ---- addresses and arguments


def test_the_url_may_have_a_slash_or_the_path_of_a_chat(server):
    for end in ("/", "/chat/completions", "/chat/completions/"):
        assert build_reward(f'judge("{server.url}{end}")')(["p"], ["c"]).tolist() == [1.0]
    assert {request[1] for request in server.requests} == {"/v1/models", "/v1/chat/completions"}


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http://h:port/v1",
        "http://h:0/v1",
        "http://me:sk-1@h/v1",
        "https://h/v1?key=sk-1",
        "http://h/v1#a",
    ],
)
def test_a_url_that_is_none(url):
    with pytest.raises(UserError, match="expected http://host:port/v1") as caught:
        build_reward(f'judge("{url}")')
    assert "sk-1" not in str(caught.value)


def test_https_to_a_server_that_speaks_http(server):
    url = server.url.replace("http://", "https://")
    with pytest.raises(UserError, match="(?i)no answer: .*ssl"):
        build_reward(f'judge("{url}", model="m", retries=0)')(["p"], ["c"])


def test_a_proxy_of_the_environment_is_asked_for_remote_hosts_alone(start, monkeypatch):
    proxy, server = start(), start(lambda question, nth: "4")
    monkeypatch.setenv("http_proxy", proxy.url)
    assert judge(server)(["p"], ["c"]).tolist() == [0.75] and proxy.requests == []
    reward = build_reward('judge("http://judge.example:81/v1", model="m")')
    assert reward(["p"], ["c"]).tolist() == [1.0]
    assert proxy.requests[0][1] == "http://judge.example:81/v1/chat/completions"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"timeout": 0}, "expected seconds above 0 and at most 86400"),
        ({"timeout": "9"}, "expected seconds above 0"),
        ({"timeout": 1e9}, "expected seconds above 0"),
        ({"retries": -1}, "expected a whole number, at least 0"),
        ({"retries": True}, "expected a whole number, at least 0"),
        ({"max_tokens": 0}, "expected a whole number, at least 1"),
        ({"model": ""}, "expected a name in quotes"),
        ({"key_env": 7}, "expected a name in quotes"),
        ({"top": 10}, "expected a whole number from 2 to 9"),
        ({"modle": "m"}, "unexpected keyword argument 'modle'"),
    ],
)
def test_arguments_that_are_wrong(server, options, message):
    with pytest.raises(UserError, match=message):
        judge(server, **options)
    assert server.requests == []


def test_a_model_on_this_machine_takes_no_argument_of_http(tiny_folder):
    with pytest.raises(UserError, match=r"only a judge at http://... takes retries, model"):
        build_reward(f'judge("{tiny_folder}", retries=1, model="m")')


def test_the_words_of_a_failure():
    assert words_of(b'{"object": "error", "message": "too long", "code": 400}') == "too long"
    assert words_of(b'{"detail": [{"loc": 1}]}') == '{"detail": [{"loc": 1}]}'
    assert words_of(b"\xff\n<html>") == "\ufffd"
    assert short("a  b\nc", 5) == "a b c" and short("a b c d", 6) == "a b..."


# ---- runs


RUN = [*FAST, "--ppo-ratio", "1", "--steps", "12", "--eval-every", "4"]


def test_a_judge_that_grades_nothing_stops_the_run_before_training(tmp_path, server, capsys):
    server.behave = lambda question, nth: (404, '{"error": {"message": "model is not loaded"}}')
    with pytest.raises(SystemExit) as caught:
        main([*RUN, "--reward", f'0.5*judge("{server.url}")', "--out", str(tmp_path / "run")])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert caught.value.code == 2 and len(lines) == 1
    assert server.url in lines[0] and "any of 2 texts" in lines[0]
    assert lines[0].endswith("HTTP 404 Not Found: model is not loaded")
    assert list(tmp_path.iterdir()) == []


def test_a_run_outlives_its_judge(tmp_path, server):
    graded = []

    def fall_ill(question, nth):
        graded.append(question)
        return "4" if len(graded) <= 2 else (500, "")  # the two texts before the first step

    server.behave = fall_ill
    reward = f'judge("{server.url}", retries=0)'
    main([*RUN, "--reward", reward, "--out", str(tmp_path / "run")])
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["ppo/unscored"] for row in rows if row["phase"] == "ppo"] == [1] * 12
    assert "eval/reward" not in rows[-1]
