"""A small GitHub: one repository with one pull request, its workflows' runs, an issue
list and releases. It knows what GitHub's documentation says of them, and nothing of
the code that is tested."""

import contextlib
import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REPOSITORY = "base-owner/sglang"
PERMISSIONS = {"owner": "admin", "maintainer": "write", "triager": "read"}
TESTED_EVENTS = ("opened", "reopened", "synchronize", "labeled")


class FakeGitHub:
    """What it holds, and what happens to it.

    Attributes:
        events: What the gate's workflow has not been run for yet: name and payload.
        starts: Called with an event's payload: whether the tests' jobs run.
    """

    def __init__(self, starts=None, fork=False):
        self.starts = starts
        self.owner = "contributor" if fork else "base-owner"
        self.commits, self.state, self.labels = 1, "open", []
        self.issue_events, self.statuses, self.runs, self.events = [], {}, [], []
        self.issues, self.releases, self.tags, self.assets = [], [], set(), {}
        self.released = 0  # releases so far, the deleted too
        self.requests = []

    # What people do

    @property
    def head(self):
        return f"{self.commits:040x}"

    def open(self):
        self._emit("opened")

    def push(self):
        self.commits += 1
        if self.state == "open":
            self._emit("synchronize")

    def close(self):
        self.state = "closed"

    def reopen(self):
        if self.state == "closed":
            self.state = "open"
            self._emit("reopened")

    def label(self, name, actor):
        if name not in self.labels:
            self.labels.append(name)
            event = {"event": "labeled", "label": {"name": name}}
            self.issue_events.append({**event, "actor": {"login": actor}})
            self._emit("labeled", name)

    def unlabel(self, name):
        if name in self.labels:
            self.labels.remove(name)
            self._emit("unlabeled", name)

    # What the runners do

    def active(self):
        return [run for run in self.runs if run["status"] != "completed"]

    def testing(self):
        return [run for run in self.active() if run["tests"]]

    def step(self, run, *conclusions):
        """Ends a stage after the other; after a failure the rest is skipped."""
        for stage, conclusion in zip(("Base", "Extra"), conclusions):
            for job in run["jobs"]:
                if job["name"].startswith(stage):
                    job.update(status="completed", conclusion=conclusion)
            if stage == "Base" and conclusion == "success":
                extra = {"name": "Extra", "status": "in_progress", "conclusion": None}
                run["jobs"].append(extra)
        ended = {job["conclusion"] for job in run["jobs"]}
        if None in ended:
            return
        if "failure" in ended and not any(j["name"] == "Extra" for j in run["jobs"]):
            skipped = {"status": "completed", "conclusion": "skipped"}
            run["jobs"].append({"name": "Extra", **skipped})
        self._complete(run, "failure" if "failure" in ended else "success")

    def end_untested(self):
        """Ends the runs of events that start no tests."""
        for run in self.active():
            if not run["tests"]:
                done = {"status": "completed", "conclusion": "skipped"}
                for name in ("Base (${{ matrix.python }})", "Extra"):
                    run["jobs"].append({"name": name, **done})
                self._complete(run, "success")

    def cancel(self, run):
        if run["status"] == "completed":
            return 409
        for job in run["jobs"]:
            if job["status"] != "completed":
                job.update(status="completed", conclusion="cancelled")
        self._complete(run, "cancelled")
        return 202

    def _complete(self, run, conclusion):
        run.update(status="completed", conclusion=conclusion)
        self._emit_run(run)

    def _emit_run(self, run):
        self.events.append(("workflow_run", {"workflow_run": self._run_json(run)}))

    def _emit(self, action, label=None):
        payload = {"action": action, "pull_request": self._pull_json()}
        if label:
            payload["label"] = {"name": label}
        self.events.append(("pull_request_target", payload))
        if not self.starts or action not in TESTED_EVENTS:
            return
        # As the workflow says: concurrency
        group = "run-ci" if label in (None, "run-ci") else len(self.runs)
        for run in self.active():
            if run["group"] == group:
                self.cancel(run)
        tests = self.starts(payload)
        jobs = [{"name": "Gate", "status": "in_progress", "conclusion": None}]
        if tests:
            jobs[0].update(status="completed", conclusion="success")
            queued = {"status": "in_progress", "conclusion": None}
            jobs += [{"name": f"Base ({v})", **queued} for v in ("3.10", "3.13")]
        run = dict(id=len(self.runs) + 1, head=self.head, tests=tests, jobs=jobs)
        run.update(status="in_progress", conclusion=None, group=group)
        self.runs.append(run)
        self._emit_run(run)

    # What the API says

    def _pull_json(self):
        repository = {"full_name": f"{self.owner}/sglang"}
        return {
            "number": 1,
            "state": self.state,
            "labels": [{"name": name} for name in self.labels],
            "head": {"sha": self.head, "ref": "topic", "repo": repository},
        }

    def _run_json(self, run):
        return {
            "id": run["id"],
            "event": "pull_request",
            "status": run["status"],
            "conclusion": run["conclusion"],
            "head_sha": run["head"],
            "head_branch": "topic",
            "head_repository": {"owner": {"login": self.owner}},
            "html_url": f"https://github.example/runs/{run['id']}",
        }

    def handle(self, method, path, query, body):
        """Returns the status and the answer of a request."""
        self.requests.append((method, path))
        prefix = f"/repos/{REPOSITORY}/"
        assert path.startswith(prefix), path
        path = path[len(prefix) :]
        for pattern, handler in self.ROUTES:
            found = re.fullmatch(pattern, f"{method} {path}")
            if found:
                return handler(self, *found.groups(), query=query, body=body)
        return 404, {"message": f"no route {method} {path}"}

    def _page(self, listed, query):
        size, page = int(query.get("per_page", 30)), int(query.get("page", 1))
        return listed[(page - 1) * size : page * size]

    def _pulls(self, query, body):
        mine = query["head"] == f"{self.owner}:topic" and self.state == query["state"]
        return 200, self._page([self._pull_json()] if mine else [], query)

    def _issue_events(self, query, body):
        return 200, self._page(self.issue_events, query)

    def _permission(self, login, query, body):
        if login not in PERMISSIONS:
            return 404, {"message": f"{login} is not a user"}
        return 200, {"permission": PERMISSIONS[login]}

    def _list_runs(self, query, body):
        assert query["event"] == "pull_request"
        found = [run for run in self.runs if run["head"] == query["head_sha"]]
        listed = [self._run_json(run) for run in reversed(found)]
        return 200, {"workflow_runs": self._page(listed, query)}

    def _jobs(self, run, query, body):
        return 200, {"jobs": self._page(self.runs[int(run) - 1]["jobs"], query)}

    def _cancel(self, run, query, body):
        return self.cancel(self.runs[int(run) - 1]), {"message": "cancel"}

    def _unlabel(self, name, query, body):
        if name not in self.labels:
            return 404, {"message": "Label does not exist"}
        self.labels.remove(name)  # by a workflow's token: no workflow is told
        return 200, []

    def _status(self, sha, query, body):
        assert len(body["description"]) <= 140
        assert body["state"] in ("error", "failure", "pending", "success")
        told = (body["state"], body["description"])
        self.statuses.setdefault(sha, {})[body["context"]] = told
        return 201, {}

    def _list_issues(self, query, body):
        listed = [
            issue
            for issue in reversed(self.issues)
            if query.get("state", "open") in ("all", issue["state"])
            and query.get("labels") in [None, *issue["labels"]]
        ]
        return 200, self._page(listed, query)

    def _add_issue(self, query, body):
        issue = {"number": len(self.issues) + 1, "state": "open", **body}
        self.issues.append({**issue, "html_url": f"https://x/{issue['number']}"})
        return 201, self.issues[-1]

    def _edit_issue(self, number, query, body):
        self.issues[int(number) - 1].update(body)
        return 200, self.issues[int(number) - 1]

    def _tag(self, name, query, body):
        return (200, {}) if name in self.tags else (404, {"message": "Not Found"})

    def _add_release(self, query, body):
        self.released += 1
        number = self.released
        urls = {
            "upload_url": f"{self.url}/repos/{REPOSITORY}/upload/{number}{{?name}}",
            "html_url": f"https://github.example/releases/{number}",
        }
        author = {"login": "github-actions[bot]"}
        self.releases.append({"id": number, "author": author, **urls, **body})
        return 201, self.releases[-1]

    def _edit_release(self, number, query, body):
        (release,) = (one for one in self.releases if one["id"] == int(number))
        release.update(body)
        return 200, release

    def _delete_release(self, number, query, body):
        self.releases = [one for one in self.releases if one["id"] != int(number)]
        self.assets.clear()
        return 200, None

    def _upload(self, number, query, body):
        self.assets[query["name"]] = body
        return 201, {}

    ROUTES = [
        (r"GET pulls/1", lambda self, query, body: (200, self._pull_json())),
        (r"GET pulls", _pulls),
        (r"GET issues/1/events", _issue_events),
        (r"GET collaborators/(.+)/permission", _permission),
        (r"GET actions/workflows/pr-test\.yml/runs", _list_runs),
        (r"GET actions/runs/(\d+)/jobs", _jobs),
        (r"POST actions/runs/(\d+)/cancel", _cancel),
        (r"DELETE issues/1/labels/(.+)", _unlabel),
        (r"POST statuses/([0-9a-f]{40})", _status),
        (r"GET issues", _list_issues),
        (r"POST issues", _add_issue),
        (r"PATCH issues/(\d+)", _edit_issue),
        (r"GET git/ref/tags/(.+)", _tag),
        (
            r"GET releases",
            lambda self, query, body: (200, self._page(self.releases, query)),
        ),
        (r"POST releases", _add_release),
        (r"PATCH releases/(\d+)", _edit_release),
        (r"DELETE releases/(\d+)", _delete_release),
        (r"POST upload/(\d+)", _upload),
    ]

    @contextlib.contextmanager
    def served(self):
        """Yields the environment of a workflow whose GitHub this is, over HTTP."""
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                assert self.headers["Authorization"] == "Bearer a-token"
                address = urllib.parse.urlsplit(self.path)
                query = dict(urllib.parse.parse_qsl(address.query))
                data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers["Content-Type"] == "application/json":
                    data = json.loads(data) if data else None
                path = urllib.parse.unquote(address.path)
                status, told = fake.handle(self.command, path, query, data)
                content = json.dumps(told).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PATCH = do_DELETE = answer

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield {
                "GITHUB_API_URL": self.url,
                "GITHUB_REPOSITORY": REPOSITORY,
                "GITHUB_TOKEN": "a-token",
                "no_proxy": "127.0.0.1",
            }
        finally:
            server.shutdown()
            server.server_close()
