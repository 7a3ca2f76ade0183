"""The run-ci gate: which pull requests are tested, and what they say of it.

Two workflows call it. The gate's own runs in the base repository, never touches what a
pull request holds, and makes what GitHub shows agree with `decide`, from what GitHub
says at that moment: so it is right whatever order events come in, and however many
are lost. The tests' workflow asks `starts`, and runs the pull request's code with a
token that can only read.

It runs on a runner's own Python, so it needs the standard library alone.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass

from fork.ci.github import GitHub, RequestError
from fork.errors import ForkError

LABEL = "run-ci"
TESTS = "pr-test.yml"  # the workflow with a job, or a matrix of them, for each stage
STAGES = ("Base", "Extra")  # the second runs after the first
CONTEXTS = {stage: f"Latest PR Test ({stage})" for stage in STAGES}
MISSING = f"Missing `{LABEL}` label -- add it to run CI tests."
BLOCKED = f"Blocked -- `{LABEL}` is required first."
# What is shown of a stage that the label allows: GitHub's state, and the text.
SHOWN = {
    "waiting": ("pending", "Waiting for its turn."),
    "running": ("pending", "Running."),
    "success": ("success", "Passed."),
    "failure": ("failure", "Failed."),
    "cancelled": ("error", "Cancelled; a push or the label starts it again."),
    "skipped": ("failure", "Not run, as Base did not pass."),
}
MAY_LABEL = ("admin", "write")


@dataclass(frozen=True)
class Run:
    """A run of the tests for the head of a pull request.

    Attributes:
        stages: What became of each stage, a key of SHOWN.
    """

    id: int
    url: str
    completed: bool
    stages: dict[str, str]


@dataclass(frozen=True)
class Decision:
    """What is to be so.

    Attributes:
        statuses: Stage to GitHub's state and the text.
        remove_label: Whether it goes, as who added it may not.
        cancel: Whether a run of the tests is stopped.
    """

    statuses: dict[str, tuple[str, str]]
    remove_label: bool
    cancel: bool


def decide(labelled: bool, by_right: bool, run: Run | None) -> Decision:
    """Decides about a pull request.

    Args:
        labelled: It has the label.
        by_right: Who added the label last may write to the repository.
        run: The newest run of the tests for its head.
    """
    if not (labelled and by_right):
        texts = {"Base": ("failure", MISSING), "Extra": ("failure", BLOCKED)}
        return Decision(texts, labelled, bool(run) and not run.completed)
    stages = run.stages if run else dict.fromkeys(STAGES, "waiting")
    return Decision({stage: SHOWN[stages[stage]] for stage in STAGES}, False, False)


def starts(event: dict) -> bool:
    """Whether an event of a pull request, as a workflow is told it, starts tests."""
    labels = [label["name"] for label in event["pull_request"]["labels"]]
    allowed = LABEL in labels and event["pull_request"]["state"] == "open"
    return allowed and (
        event["action"] in ("opened", "reopened", "synchronize")
        or (event["action"] == "labeled" and event["label"]["name"] == LABEL)
    )


def stage_of(jobs: list[dict], stage: str, completed: bool) -> str:
    """What became of a stage: of all its jobs in a run, a key of SHOWN."""
    mine = [job for job in jobs if job["name"].split(" ")[0] == stage]
    ended = {job["conclusion"] for job in mine if job["status"] == "completed"}
    if ended & {"failure", "timed_out", "startup_failure"}:
        return "failure"
    if "cancelled" in ended:
        return "cancelled"
    if any(job["status"] != "completed" for job in mine):
        started = any(job["status"] in ("in_progress", "completed") for job in mine)
        return "running" if started else "waiting"
    if ended == {"success"}:
        return "success"
    # All of its jobs were skipped, or it has none, yet or because the run was stopped.
    return ("skipped" if mine else "cancelled") if completed else "waiting"


def newest_run(github: GitHub, head: str) -> Run | None:
    """The newest run of the tests for a commit, but those that tested nothing."""
    path = f"actions/workflows/{TESTS}/runs"
    for found in github.pages(
        path, "workflow_runs", head_sha=head, event="pull_request"
    ):
        # One that waits for a maintainer's approval is said to be completed.
        approved = found["conclusion"] != "action_required"
        completed = found["status"] == "completed" and approved
        jobs = list(github.pages(f"actions/runs/{found['id']}/jobs", "jobs"))
        stages = {stage: stage_of(jobs, stage, completed) for stage in STAGES}
        if not completed or stages["Base"] != "skipped":
            return Run(found["id"], found["html_url"], completed, stages)
    return None


def added_by_right(github: GitHub, number: int) -> bool:
    """Whether who added the label last may write to the repository."""
    actor = None
    for event in github.pages(f"issues/{number}/events"):
        if event["event"] == "labeled" and event["label"]["name"] == LABEL:
            actor = event["actor"]
    if not actor:
        return False
    try:
        told = github("GET", f"collaborators/{actor['login']}/permission")
    except RequestError as error:
        if error.status == 404:  # a bot, or an account that is gone
            return False
        raise
    return told["permission"] in MAY_LABEL


def heads(github: GitHub, name: str, event: dict) -> list[dict]:
    """The pull requests that an event is about, as they are now.

    A run of the tests names none when it is of a fork, so they are those of its branch.
    """
    if name != "workflow_run":
        return [github("GET", f"pulls/{event['pull_request']['number']}")]
    run = event["workflow_run"]
    if run["event"] != "pull_request" or not run["head_repository"]:
        return []
    branch = f"{run['head_repository']['owner']['login']}:{run['head_branch']}"
    return list(github.pages("pulls", state="open", head=branch))


def reconcile(github: GitHub, pull: dict) -> Decision:
    """Makes what GitHub shows of a pull request what `decide` says."""
    head = pull["head"]["sha"]
    labelled = any(label["name"] == LABEL for label in pull["labels"])
    by_right = labelled and added_by_right(github, pull["number"])
    run = newest_run(github, head)
    decision = decide(labelled, by_right, run)
    if decision.remove_label:
        _unless_gone(github, "DELETE", f"issues/{pull['number']}/labels/{LABEL}")
    if decision.cancel:
        _unless_gone(github, "POST", f"actions/runs/{run.id}/cancel")
    for stage, (state, text) in decision.statuses.items():
        status = {"context": CONTEXTS[stage], "state": state, "description": text}
        if run and text not in (MISSING, BLOCKED):
            status["target_url"] = run.url
        github("POST", f"statuses/{head}", status)
    return decision


def _unless_gone(github: GitHub, method: str, path: str) -> None:
    """Makes a request whose end somebody may have brought about meanwhile."""
    try:
        github(method, path)
    except RequestError as error:
        if error.status not in (404, 409):
            raise


def main() -> str | int:
    """``python -m fork.ci.gate`` is the gate; with ``starts`` it is the tests' question,
    answered as the step's output ``run``."""
    try:
        with open(os.environ["GITHUB_EVENT_PATH"], encoding="utf-8") as file:
            event = json.load(file)
        if sys.argv[1:] == ["starts"]:
            with open(os.environ["GITHUB_OUTPUT"], "a", encoding="utf-8") as output:
                output.write(f"run={str(starts(event)).lower()}\n")
            return 0
        github = GitHub.of_workflow()
        for pull in heads(github, os.environ["GITHUB_EVENT_NAME"], event):
            decision = reconcile(github, pull)
            for stage, (_, text) in decision.statuses.items():
                print(f"#{pull['number']} {CONTEXTS[stage]}: {text}")
    except KeyError as error:
        return (
            f"error: {error.args[0]} is not set or not in the event: the gate runs in "
            "a workflow of GitHub Actions, for an event of a pull request."
        )
    except ForkError as error:
        return f"error: {error}"
    return 0


if __name__ == "__main__":
    sys.exit(main())
