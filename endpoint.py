"""Grades from a chat model behind HTTP: a server that speaks OpenAI's chat API.

vLLM, Ollama, llama.cpp, LM Studio and most hosts speak it. An answer is read as a grade only if it
is nothing but a grade: the right grade or none. Each request has a limit of time for the whole
answer, and of bytes. Left out on purpose: streaming, redirects (the key stays with its host), and
hosts that want other names for `max_tokens` and `temperature`.

    export OPENAI_API_KEY=...           # if the server wants one
    python train.py --reward 'judge("http://127.0.0.1:8000/v1", rubric="Is the answer polite?")'
"""

import functools
import http.client
import io
import ipaddress
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from time import monotonic, sleep, time
from urllib.parse import urlsplit

import parallel
from cli import UserError, first_line, visible

CONCURRENCY = 8  # questions that are on their way together
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds before a request is made again
MAX_BYTES = 1_000_000  # of an answer; a grade with much thinking before it has some 20,000
MAX_TIMEOUT = 86_400  # seconds

# ------------------------------------------------------------------ reading a grade

# What may stand around a number: space, emphasis, quotes, brackets. No minus, no comparison.
MARKS = r"""\s*_#`"'“”‘’()\[\]{}:="""
AROUND, END = f"[{MARKS}]*", f"[{MARKS}.!]*"
NUMBER = r"(\d+(?:\.\d+)?)"
# "4", "Grade: 4", "4 / 5", "2.5 out of 5". A number in a sentence may not be the grade.
GRADE = re.compile(
    rf"{AROUND}(?:(?:final |overall )?(?:grade|score|rating){AROUND})?{NUMBER}"
    rf"(?:{AROUND}(?:/|out\s+of|of){AROUND}{NUMBER})?{END}",
    re.IGNORECASE,
)
FENCE = re.compile(r"```[A-Za-z]*\s(.*)```", re.DOTALL)
NAMES = ("grade", "score", "rating")
ANOTHER_SCALE = re.compile(r"max|out.?of|scale|range|total", re.IGNORECASE)


def grade_of(answer: str, top: int) -> float | None:
    """The grade from 1 to `top` that an answer consists of; None for anything else.

    What a model thinks before `</think>` is no part of the answer. A grade out of another number
    than `top` is none.

    >>> grade_of("<think>Polite, but short: 3?</think> **Grade: 4/5**", top=5)
    4.0
    >>> grade_of('{"score": 2.5, "reason": "too short"}', top=5)
    2.5
    >>> grade_of("8/10", top=5), grade_of("3 or 4", top=5), grade_of("<think>4", top=5)
    (None, None, None)
    """
    answer = answer.rpartition("</think>")[2].strip()
    fenced = FENCE.fullmatch(answer)
    if fenced is not None:
        answer = fenced[1].strip()
    if answer.startswith("{"):
        return _grade_in_json(answer, top)
    return _grade_in_text(answer, top)


def _grade_in_text(answer: str, top: int) -> float | None:
    match = GRADE.fullmatch(answer)
    if match is None:
        return None
    grade, out_of = float(match[1]), float(match[2] or top)
    return grade if out_of == top and 1 <= grade <= top else None


def _grade_in_json(answer: str, top: int) -> float | None:
    """The grade in an object such as {"grade": 4, "reason": "..."}, if it names exactly one."""
    try:
        pairs = json.loads(answer, object_pairs_hook=list)  # so that two grades are seen as two
    except (ValueError, RecursionError):
        return _grade_in_text(answer, top)  # such as {4}
    grades = [value for name, value in pairs if name.lower() in NAMES]
    scales = [value for name, value in pairs if ANOTHER_SCALE.search(name)]
    if len(grades) != 1 or any(str(scale) != str(top) for scale in scales):
        return None
    [grade] = grades
    if isinstance(grade, str):
        return _grade_in_text(grade, top)
    return float(grade) if type(grade) in (int, float) and 1 <= grade <= top else None


def content_of(answer) -> tuple[str, bool]:
    """The text of a chat completion, and whether it was cut at `max_tokens`.

    The content may be a string, or parts such as {"type": "text", "text": "4"}. What a server
    keeps apart as reasoning is not read. Raises NoAnswer for other JSON.
    """
    try:
        choice = answer["choices"][0]
        content, is_cut = choice["message"].get("content"), choice.get("finish_reason") == "length"
    except (KeyError, IndexError, TypeError, AttributeError):
        raise NoAnswer("the answer is JSON, but no chat completion") from None
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        content = "".join(str(part.get("text", "")) for part in parts)
    return (content if isinstance(content, str) else ""), is_cut


# ------------------------------------------------------------------ one request


class NoAnswer(Exception):
    """Why there is no usable answer, in the server's words where it has any. `again`: the same
    request may succeed later, after `wait` seconds if the server said so. `unknown`: the server
    does not know what is asked for."""

    def __init__(
        self, reason: str, again: bool = False, wait: float | None = None, unknown: bool = False
    ):
        super().__init__(reason)
        self.again, self.wait, self.unknown = again, wait, unknown


class _TimedReader(io.RawIOBase):
    """What a socket receives until `deadline`. A timeout of the socket alone begins anew with each
    byte, so a slow server could hold a run for ever. Raises TimeoutError."""

    def __init__(self, sock, raw: io.RawIOBase, deadline: float):
        self._sock, self._raw, self._deadline = sock, raw, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int | None:
        left = self._deadline - monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._sock.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _TimedResponse(http.client.HTTPResponse):
    def __init__(self, sock, *args, deadline: float, **options):
        super().__init__(sock, *args, **options)
        self.fp = io.BufferedReader(_TimedReader(sock, self.fp.detach(), deadline))


class _Connection(http.client.HTTPConnection):
    """A connection whose `timeout` is that of the whole exchange."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        deadline = monotonic() + self.timeout
        self.response_class = functools.partial(_TimedResponse, deadline=deadline)


class _SecureConnection(_Connection, http.client.HTTPSConnection):
    pass


class _Http(urllib.request.HTTPHandler):
    def http_open(self, request):
        return self.do_open(_Connection, request)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, request):
        return self.do_open(_SecureConnection, request)


class _EveryStatus(urllib.request.HTTPErrorProcessor):
    """Every status is returned. So no redirect is followed, and the key stays with its host."""

    def http_response(self, request, response):
        return response

    https_response = http_response


class Endpoint:
    """A server at `url`, such as http://127.0.0.1:8000/v1, asked with the key if there is one.

    `timeout` is in seconds, from the first byte that is sent to the last one that is received.
    After a broken or late answer, and after the statuses 408, 429 and 5xx, a request is made up to
    `retries` times more, when the server asks for it or after 0.5, 1, 2, ... seconds.
    """

    def __init__(self, url: str, key: str | None, timeout: float, retries: int):
        self.url, self.name = url, f"judge({url!r})"
        self._key, self._timeout, self._retries = key, timeout, retries
        # Some hosts refuse the name that urllib gives itself.
        self._headers = {"Content-Type": "application/json", "User-Agent": "judge/1"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        handlers = [_Http, _Https, _EveryStatus]
        if is_local(url):  # a proxy cannot reach this machine
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    def without_key(self, text: str) -> str:
        """The text without the key, which a server may repeat."""
        return text if self._key is None else text.replace(self._key, "***")

    def ask(self, path: str, body: dict | None = None):
        """The JSON that the server answers to a GET, or to a POST of `body`. Raises NoAnswer."""
        wait, tries_left = FIRST_WAIT, self._retries
        while True:
            try:
                return self._ask_once(path, body)
            except NoAnswer as problem:
                if not problem.again or not tries_left:
                    raise
                sleep(min(wait if problem.wait is None else problem.wait, LONGEST_WAIT))
            wait, tries_left = min(2 * wait, LONGEST_WAIT), tries_left - 1

    def _ask_once(self, path: str, body: dict | None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self._headers)
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                text = response.read(MAX_BYTES + 1)
        except (OSError, http.client.HTTPException, ValueError) as problem:
            raise NoAnswer(self._without_answer(problem), again=True) from None
        status = f"HTTP {response.status} {response.reason}"
        if 300 <= response.status < 400:
            raise NoAnswer(f"{status}: the server points to {response.headers['Location']}")
        if not 200 <= response.status < 300:
            unknown = response.status in (404, 405, 501)
            again = response.status in (408, 429) or (response.status >= 500 and not unknown)
            wait = asked_wait(response.headers["Retry-After"])
            raise NoAnswer(f"{status}: {words_of(text)}", again, wait, unknown)
        if len(text) > MAX_BYTES:
            raise NoAnswer(f"{status}: an answer of more than {MAX_BYTES:,} bytes")
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            message = f"{status}: an answer that is not JSON: {words_of(text)}"
            raise NoAnswer(message, again=True) from None
        if isinstance(answer, dict) and answer.get("error"):
            raise NoAnswer(f"{status}, and an error: {words_of(text)}", again=True)
        return answer

    def _without_answer(self, problem: Exception) -> str:
        """Why nothing came back."""
        cause = problem.reason if isinstance(problem, urllib.error.URLError) else problem
        if isinstance(cause, TimeoutError):
            return f"no whole answer within {self._timeout:g} seconds (timeout=)"
        return f"no answer: {first_line(cause)}"


def words_of(text: bytes) -> str:
    """What the body of a failure says: the message in its JSON, else its first line."""
    words = text.decode(errors="replace")
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        answer = None
    if isinstance(answer, dict):
        error = answer.get("error") or answer
        if isinstance(error, dict):
            error = error.get("message") or error.get("detail")
        words = error if isinstance(error, str) else words
    lines = words.strip().splitlines()
    return lines[0] if lines else "nothing is said about it"


def asked_wait(retry_after: str | None) -> float | None:
    """Seconds until the time of a header Retry-After, a number or a date; None if it has none."""
    if retry_after is None:
        return None
    if re.fullmatch(r"\d+(\.\d+)?", retry_after.strip()):
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time())
    except (ValueError, OverflowError):
        return None


def short(text: str, most: int) -> str:
    """The text in one line of at most `most` characters."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."


# ------------------------------------------------------------------ address, key and model


def checked_url(url: str) -> str:
    """The URL without the path of a chat. Raises UserError, which does not repeat a password."""
    base = url.rstrip("/").removesuffix("/chat/completions")
    try:
        parts = urlsplit(base)
        is_good = parts.hostname and parts.port != 0  # reading a wrong port raises ValueError
    except ValueError:
        is_good = False
    if not is_good or "@" in parts.netloc or "?" in base or "#" in base:
        raise UserError(
            "judge(URL): expected http://host:port/v1 or https://..., without a user, ? or #; "
            "a key stands in an environment variable, and key_env= names it"
        )
    return base


def is_local(url: str) -> bool:
    """Is the host of the URL this machine?"""
    host = urlsplit(url).hostname
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def find_key(url: str, key_env: str | None) -> str | None:
    """The key in the environment variable `key_env`, else in OPENAI_API_KEY if that is set.

    Everybody between here and a remote host can read what plain http sends: there a key goes only
    if `key_env` names it. Raises UserError, which never holds the key.
    """
    variable = key_env or "OPENAI_API_KEY"
    key = os.environ.get(variable, "").strip()
    if not key:
        if key_env is not None:
            raise UserError(f"judge({url!r}): the environment variable {key_env} is not set")
        return None
    if not re.fullmatch(r"[!-~]+", key):
        raise UserError(
            f"judge({url!r}): the environment variable {variable} holds a space or a letter "
            "that no key has"
        )
    if key_env is None and urlsplit(url).scheme != "https" and not is_local(url):
        print(
            f"note: judge({url!r}) is plain http to another machine, so OPENAI_API_KEY is not "
            'sent; key_env="OPENAI_API_KEY" sends it'
        )
        return None
    return key


def only_model(server: Endpoint) -> str:
    """The one model that the server has, or "default" where it has no list of them; said in a line.
    Raises UserError if it has another number of models."""
    try:
        names = [str(entry["id"]) for entry in server.ask("/models")["data"]]
    except NoAnswer as problem:
        if problem.unknown:
            print(
                f'note: {server.name}: the server has no list of models: it is asked for "default"'
            )
            return "default"
        reason = short(server.without_key(str(problem)), 200)
        raise UserError(
            f"{server.name}: the list of its models cannot be had ({reason}); is the server "
            'running, and is the URL right? model="..." names a model without that list'
        ) from None
    except (KeyError, TypeError):
        raise UserError(
            f'{server.name}: its answer to GET /models is no list; name the model: model="..."'
        ) from None
    if len(names) != 1:
        some = ", ".join(short(name, 80) for name in names[:10])
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        found = f"{len(names)} models: {some}{more}" if names else "no model"
        raise UserError(f'{server.name}: the server has {found}; name one: model="..."')
    print(f"{server.name}: the server has one model, {visible(names[0])}, which is asked")
    return names[0]


# ------------------------------------------------------------------ questions -> grades


def grader(
    url: str,
    top: int,
    model: str | None = None,
    key_env: str | None = None,
    timeout: float = 60,
    retries: int = 2,
    max_tokens: int = 1024,
) -> Callable[[list[str]], list[float | None]]:
    """A function: questions -> grades from 1 to `top`, None for a question without a usable answer.

    Eight questions are asked together, equal ones once, and grades are kept. Until there is a first
    grade, a call that gets none raises UserError with the server's own words: a judge that can
    grade nothing is found before the training begins. `max_tokens` is the room for thinking and
    grade; an answer that is cut there is no grade.
    """
    check_arguments(url, model, key_env, timeout, retries, max_tokens)
    url = checked_url(url)
    server = Endpoint(url, find_key(url, key_env), timeout, retries)
    if model is None:
        model = parallel.on_main(only_model, server)
    known: dict[str, float] = {}  # question -> grade

    def grade(question: str) -> float:
        messages = [{"role": "user", "content": question}]
        body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}
        content, is_cut = content_of(server.ask("/chat/completions", body))
        found = None if is_cut else grade_of(content, top)
        if found is None:
            said = f"'{short(server.without_key(content), 80)}'" if content.strip() else "nothing"
            why = f" (cut at max_tokens={max_tokens}: thinking needs more)" if is_cut else ""
            raise NoAnswer(f"answered {said}, which is no grade from 1 to {top}{why}")
        return found

    def grade_or_reason(question: str) -> float | NoAnswer:
        try:
            return grade(question)
        except NoAnswer as problem:
            return problem

    def ask(questions: list[str]) -> list[float | None]:
        new = [question for question in dict.fromkeys(questions) if question not in known]
        with ThreadPoolExecutor(max_workers=CONCURRENCY) as pool:
            outcomes = list(pool.map(grade_or_reason, new))
        for question, outcome in zip(new, outcomes, strict=True):
            if not isinstance(outcome, NoAnswer):
                known[question] = outcome
        if new and not known:
            reason = short(server.without_key(str(outcomes[-1])), 200)
            texts = "the one text" if len(new) == 1 else f"any of {len(new)} texts"
            raise UserError(f"{server.name} gave no grade to {texts}; the last reason: {reason}")
        return [known.get(question) for question in questions]

    return ask


def check_arguments(url, model, key_env, timeout, retries, max_tokens) -> None:
    """Raises UserError for a value that a judge behind HTTP cannot work with."""
    for name, value in (("model", model), ("key_env", key_env)):
        if value is not None and not (isinstance(value, str) and value.strip()):
            raise UserError(f"judge({name}={value!r}): expected a name in quotes")
    if type(timeout) not in (int, float) or not 0 < timeout <= MAX_TIMEOUT:
        raise UserError(
            f"judge(timeout={timeout!r}): expected seconds above 0 and at most {MAX_TIMEOUT}"
        )
    for name, value, least in (("retries", retries, 0), ("max_tokens", max_tokens, 1)):
        if type(value) is not int or value < least:
            raise UserError(f"judge({name}={value!r}): expected a whole number, at least {least}")
