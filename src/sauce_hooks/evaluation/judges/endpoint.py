"""A judge behind any OpenAI-compatible endpoint, on this machine or elsewhere."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import re
import threading
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from sauce_hooks.errors import JudgeBudgetError, JudgeError, UnjudgedAnswersWarning
from sauce_hooks.evaluation.judges.budget import Account, Budget
from sauce_hooks.evaluation.judges.cache import Kept, VerdictCache
from sauce_hooks.evaluation.judges.data import read_json
from sauce_hooks.evaluation.judges.opinion import UnsureJudge, Verdict

_VERDICTS: Mapping[str, Verdict] = MappingProxyType({"yes": True, "no": False, "unsure": None})
_ANSWER = re.compile(r"[\W_]*(yes|no|unsure)[*_\"'”)\]]*\s*(?:$|[.,;:!\n–—-].*)", re.IGNORECASE | re.DOTALL)
_THINKING = re.compile(r"<think>.*?</think>", re.IGNORECASE | re.DOTALL)
_LONGEST_PAUSE_S = 60.0
_CONNECT_S = 10.0
_SHOWN = 200
"""Characters of a strange answer that an error shows."""


@dataclass(frozen=True)
class Prompt:
    """What the judge is asked."""

    version: int
    system: str
    user: str

    def messages(self, text: str, concept: str) -> list[dict[str, str]]:
        """The chat about one description."""
        parts = {"{text}": text, "{concept}": concept}
        # In one pass: a description that holds "{concept}" stays as it is.
        asked = re.sub(r"\{text\}|\{concept\}", lambda found: parts[found[0]], self.user)
        return [{"role": "system", "content": self.system}, {"role": "user", "content": asked}]


@cache
def prompt() -> Prompt:
    """The prompt that is in use; prompt.json holds it."""
    return Prompt(**read_json("prompt.json"))


class _TryAgain(JudgeError):
    """The endpoint may answer if asked again."""

    def __init__(self, message: str, after_s: float | None = None) -> None:
        self.after_s = after_s
        super().__init__(message)


class Endpoint(UnsureJudge):
    """A language model behind an OpenAI-compatible endpoint, asked about one description at a time, at temperature 0.

    Every verdict is in the cache as soon as it is there. What stops a run (the budget, the network, you) loses none.
    """

    def __init__(
        self,
        model: str,
        url: str,
        *,
        cache: str | Path | None = None,
        budget: Budget | None = None,
        api_key_env: str | None = "OPENAI_API_KEY",
        timeout: float = 60.0,
        attempts: int = 5,
        pause: float = 1.0,
        workers: int = 4,
        body: Mapping[str, Any] | None = None,
    ) -> None:
        """Judge by an endpoint.

        Args:
            model: what the endpoint calls the model.
            url: of the endpoint up to its version: "http://localhost:8000/v1", "https://api.openai.com/v1".
            cache: file that verdicts are kept in; None: in memory, as long as the judge lives.
            budget: what may be spent; no limit by default.
            api_key_env: name of the environment variable that holds the key, read at each request; None sends none. The key
                itself is never kept, written or shown.
            timeout: seconds to wait for an answer.
            attempts: how often to try a request that may succeed later (429, 5xx, no connection, no answer, garbage).
            pause: seconds before the second attempt; it doubles, with jitter, up to a minute. `Retry-After` is obeyed.
            workers: requests at the same time.
            body: other fields of the request, `{"max_tokens": None, "max_completion_tokens": 2000}` for models that think;
                None leaves a field out.

        Raises:
            JudgeError: a URL that can't be used: not http(s), with a password or a query, or plain http to another machine
                while there is a key.
            JudgeFileError: a cache that can't be used.
        """
        self._model, self._url, self._key_env = model, _checked(url), api_key_env
        self._timeout, self._attempts, self._pause, self._workers = timeout, attempts, pause, workers
        self._told = dict(body or {})
        asked = {"model": model, "temperature": 0, "max_tokens": 16, **self._told}
        self._body = {name: value for name, value in asked.items() if value is not None}
        self.cache = VerdictCache(cache)
        self.account = Account(budget or Budget())
        self._refuse_plain_http()

    @property
    def name(self) -> str:
        """The model, the version of the prompt, and what the request was told beside them."""
        more = f" {json.dumps(self._told, sort_keys=True)}" if self._told else ""
        return f"endpoint prompt-{prompt().version} {self._model}{more}"

    @property
    def note(self) -> str:
        """That nobody knows how good it is: finding out would spend what the user may not want to."""
        return (
            f"How well {self.name} agrees with labels made by hand is not measured by itself, as that takes requests: "
            "judges.agreement(judge) does it."
        )

    def __repr__(self) -> str:
        return f"Endpoint({self._model!r}, {self._url!r})"

    def verdicts(self, texts: Sequence[str], concept: str) -> list[Verdict]:
        """For each text what the model answers; None for "unsure", a refusal or an answer that can't be read.

        Raises:
            JudgeBudgetError: the budget is spent.
            JudgeError: the endpoint isn't there, refuses, or doesn't answer as such endpoints do.
        """
        keys = {text: self._cache_key(text, concept) for text in texts}
        kept = dict(self.cache.get(list(keys.values())))
        missing = [text for text, key in keys.items() if key not in kept]
        stop = threading.Event()
        with ThreadPoolExecutor(self._workers) as pool:
            try:
                asked = {pool.submit(self._judge, text, concept, keys[text], stop): text for text in missing}
                done, _ = wait(asked, return_when=FIRST_EXCEPTION)
                failures = [error for future in done if (error := future.exception()) is not None]
            finally:
                stop.set()  # those that wait to try again
                pool.shutdown(cancel_futures=True)
        if failures:
            judged = len(keys) - len(missing) + sum(not f.cancelled() and f.exception() is None for f in asked)
            raise self._with_account(failures[0], judged, len(keys), concept)
        answers = {text: future.result() for future, text in asked.items()}
        unread = [answers[text] for text in missing if answers[text] not in _VERDICTS]
        if unread:
            warnings.warn(
                f"{self.name} answered {len(unread)} of {len(missing)} times with neither yes, no nor unsure, for example "
                f"{self._without_key(unread[0])[:_SHOWN]!r}: these are left open, which counts as a mention, and will be "
                "asked again next time",
                UnjudgedAnswersWarning,
                stacklevel=2,
            )
        return [_VERDICTS.get(kept[key] if (key := keys[text]) in kept else answers[text]) for text in texts]

    def _with_account(self, error: BaseException, judged: int, n: int, concept: str) -> BaseException:
        """The error with how far it got and where that is."""
        if not isinstance(error, JudgeError):
            return error
        where = f"in {self.cache.path}" if self.cache.path else "in this judge's memory (cache=... keeps them in a file)"
        further = " Raise the budget and run it again: it goes on from there." if isinstance(error, JudgeBudgetError) else ""
        kind = JudgeBudgetError if isinstance(error, JudgeBudgetError) else JudgeError
        return kind(
            f"{error}. {judged} of {n} descriptions are judged for {concept!r}; their verdicts are kept {where}.{further}"
        )

    def _cache_key(self, text: str, concept: str) -> str:
        asked = [self._url, prompt().version, prompt().messages(text, concept), self._body]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def _judge(self, text: str, concept: str, key: str, stop: threading.Event) -> str:
        """yes, no or unsure, by then in the cache; or what the model said instead."""
        from tenacity import (
            Retrying,
            retry_if_exception_type,
            stop_after_attempt,
            stop_when_event_set,
            wait_random_exponential,
        )
        from tenacity.nap import sleep_using_event

        usual = wait_random_exponential(multiplier=self._pause, max=_LONGEST_PAUSE_S)

        def pause(state: Any) -> float:
            error = state.outcome.exception()
            told = error.after_s if isinstance(error, _TryAgain) else None
            return usual(state) if told is None else min(told, _LONGEST_PAUSE_S)

        retrying = Retrying(
            retry=retry_if_exception_type(_TryAgain),
            stop=stop_after_attempt(self._attempts) | stop_when_event_set(stop),
            wait=pause,
            sleep=sleep_using_event(stop),
            reraise=True,
        )
        said: str = retrying(self._ask, prompt().messages(text, concept))
        verdict = read_answer(said)
        if verdict is None:
            return said
        self.cache.put(Kept(key, verdict, prompt().version, self._model, concept, text))
        return verdict

    def _ask(self, messages: list[dict[str, str]]) -> str:
        """One request: what the model says."""
        import requests

        self.account.request()
        body = {**self._body, "messages": messages}
        try:
            with requests.Session() as session:
                session.trust_env = not _is_local(self._url)  # no proxy on the way to this very machine
                answer = session.post(
                    self._url, json=body, auth=self._sign, timeout=(_CONNECT_S, self._timeout), allow_redirects=False
                )
        except requests.Timeout:
            raise _TryAgain(f"the judge's endpoint {self._url} gave no answer in {self._timeout:g} seconds") from None
        except requests.RequestException as error:
            raise _TryAgain(
                f"there is no judge's endpoint at {self._url} ({type(error).__name__}): is the server running, and the URL "
                "right? Without one, Lexicon() judges offline"
            ) from None
        said = self._without_key(answer.text)[:_SHOWN]
        status = answer.status_code
        if status in (408, 409, 425, 429) or status >= 500:
            raise _TryAgain(
                f"the judge's endpoint {self._url} is not ready: {status} {said!r}", _retry_after(answer.headers)
            )
        if status in (401, 403):
            raise JudgeError(
                f"the judge's endpoint {self._url} wants another key: {status} {said!r}. "
                f"Set {self._key_env or 'api_key_env'}"
            )
        if status != 200:
            raise JudgeError(
                f"the judge's endpoint {self._url} refuses: {status} {said!r}. Are the URL and the model's name right?"
            )
        try:
            found = answer.json()
            content = found["choices"][0]["message"].get("content") or ""
            if not isinstance(content, str):
                raise TypeError
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            self.account.answered(len(json.dumps(body).encode()), 0)
            raise _TryAgain(f"{self._url} does not answer as an OpenAI-compatible endpoint does: {said!r}") from None
        # An endpoint that doesn't count is counted for, at the most that it can be: a token a byte.
        usage = found.get("usage") if isinstance(found.get("usage"), dict) else {}
        self.account.answered(
            _count(usage.get("prompt_tokens"), json.dumps(messages)), _count(usage.get("completion_tokens"), content)
        )
        return content

    def _key(self) -> str | None:
        key = os.environ.get(self._key_env, "").strip() if self._key_env else ""  # files with keys end in a newline
        if not (key.isascii() and key.isprintable()):
            raise JudgeError(f"the key in {self._key_env} has signs in it that no HTTP header may have: set it anew")
        return key or None

    def _refuse_plain_http(self) -> None:
        if self._key() and urlsplit(self._url).scheme == "http" and not _is_local(self._url):
            raise JudgeError(
                f"the key in {self._key_env} would go to {urlsplit(self._url).hostname} over plain http, for all to read: "
                "use https, or api_key_env=None if the endpoint needs no key"
            )

    def _sign(self, request: Any) -> Any:
        """Put the key on a request. Given in any case, so that no password from elsewhere (.netrc) is sent instead."""
        self._refuse_plain_http()  # the key may be there only by now
        key = self._key()
        if key:
            request.headers["Authorization"] = f"Bearer {key}"
        return request

    def _without_key(self, text: str) -> str:
        key = self._key()
        return re.sub(r"\bsk-[\w*-]{4,}", "***", text.replace(key, "***") if key else text)


def read_answer(said: str) -> str | None:
    """yes, no or unsure, from what a model says; None if it says something else.

    Read are the bare word, the word with an explanation behind it ("Yes, ..."), and JSON with one of them as its only value.
    """
    text = _THINKING.sub("", said).strip()
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = text
    if isinstance(found, dict) and len(found) == 1:
        found = next(iter(found.values()))
    match = _ANSWER.fullmatch(found) if isinstance(found, str) else None
    return match[1].lower() if match else None


def _count(told: Any, text: str) -> int:
    return told if isinstance(told, int) and told >= 0 else len(text.encode())


def _retry_after(headers: Mapping[str, str]) -> float | None:
    try:
        return max(0.0, float(headers.get("Retry-After", "")))
    except ValueError:  # a date, or nothing
        return None


def _checked(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise JudgeError(f"{url!r} is no URL of an endpoint: give one such as 'http://localhost:8000/v1'")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise JudgeError(
            "the endpoint's URL holds a password or a query, which would stand in every message: put the key "
            "into the environment"
        )
    return f"{url.rstrip('/').removesuffix('/chat/completions')}/chat/completions"


def _is_local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
