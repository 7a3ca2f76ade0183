"""GitHub's REST API, with nothing but the standard library."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from fork.errors import ForkError


class GitHub:
    """One repository's part of the API. Calling it makes a request.

    Args:
        repository: Its name, such as ``owner/name``.
        token: What the requests are authorized with.
        api: The address of the API.
    """

    def __init__(self, repository: str, token: str, api: str):
        self.repository, self.token, self.api = repository, token, api

    @classmethod
    def of_workflow(cls) -> GitHub:
        """The repository that the environment of a running workflow names.

        Raises:
            ForkError: There is no such environment.
        """
        names = ("GITHUB_REPOSITORY", "GITHUB_TOKEN", "GITHUB_API_URL")
        missing = [name for name in names if not os.environ.get(name)]
        if missing:
            raise ForkError(
                f"{' and '.join(missing)} must be set, as in a workflow of GitHub "
                "Actions: run this there."
            )
        return cls(*(os.environ[name] for name in names))

    def __call__(self, method: str, path: str, body: dict | None = None, **query):
        """Returns the answer to a request.

        Args:
            path: Below the repository's, such as ``pulls/1``.

        Raises:
            ForkError: The API refuses or does not answer.
        """
        url = f"{self.api}/repos/{self.repository}/{path}"
        if query:
            url += f"?{urllib.parse.urlencode(query)}"
        return self._send(method, url, None if body is None else json.dumps(body))

    def pages(self, path: str, key: str | None = None, **query) -> Iterator[dict]:
        """Yields what a request lists, of all its pages.

        Args:
            key: The member of the answer that is the list, if it is not the answer.
        """
        page = 1
        while True:
            answer = self("GET", path, per_page=100, page=page, **query)
            listed = answer[key] if key else answer
            yield from listed
            if len(listed) < 100:
                return
            page += 1

    def upload(self, url: str, file: Path) -> None:
        """Adds a file to the release with this upload address."""
        query = urllib.parse.urlencode({"name": file.name})
        data = file.read_bytes()
        self._send(
            "POST", f"{url.split('{')[0]}?{query}", data, "application/octet-stream"
        )

    def _send(self, method: str, url: str, data, kind: str = "application/json"):
        request = urllib.request.Request(
            url,
            method=method,
            data=data.encode() if isinstance(data, str) else data,
            headers={
                "Accept": "application/vnd.github+json",
                "Authorization": f"Bearer {self.token}",
                "Content-Type": kind,
                "User-Agent": "sglang-gemma4-fork",
                "X-GitHub-Api-Version": "2022-11-28",
            },
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                told = answer.read()
        except urllib.error.HTTPError as error:
            raise RequestError(method, url, error) from None
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            reason = getattr(error, "reason", error)
            raise ForkError(f"{url} does not answer ({reason}): run again.") from None
        return json.loads(told) if told else None


class RequestError(ForkError):
    """A request that the API refused; ``status`` is why."""

    def __init__(self, method: str, url: str, error: urllib.error.HTTPError):
        self.status = error.code
        try:
            reason = json.loads(error.read())["message"]
        except (ValueError, KeyError, TypeError):
            reason = error.reason
        super().__init__(f"{method} {url} was refused: {error.code} {reason}.")
