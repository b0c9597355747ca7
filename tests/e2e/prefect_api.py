"""What tests ask a Prefect server: its runs, their states, logs and tasks."""

import json
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from waiting import wait_for

ENDS = {"Completed", "Failed", "Crashed", "Cancelled"}


class Asks:
    """Whoever has the address of a server in its `environment`, and the server's log in its `folder`."""

    environment: dict[str, str]
    folder: Path

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.environment['PREFECT_API_URL']}{path}", data, {"content-type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return json.loads(answer.read() or "null")
        except (urllib.error.URLError, OSError) as error:
            print(f"{method} {path}: {error}")
            return None

    def insist(self, method: str, path: str, body: Any = None) -> Any:
        """A server on SQLite that is busy may refuse once."""
        for _ in range(10):
            if (answer := self.ask(method, path, body)) is not None:
                return answer
            time.sleep(1)
        raise AssertionError(f"the server refused {method} {path}: see {self.folder}/server.log")

    def submit(self, deployment: str = "reproduce/reproduce", **parameters: Any) -> str:
        """The id of a new flow run."""
        found = self.insist("GET", f"/deployments/name/{deployment}")
        return self.insist("POST", f"/deployments/{found['id']}/create_flow_run", {"parameters": parameters})["id"]

    def whole_state(self, run: str) -> dict[str, Any]:
        return (self.ask("GET", f"/flow_runs/{run}") or {}).get("state") or {"name": "unknown"}

    def state(self, run: str) -> str:
        return self.whole_state(run)["name"]

    def ends(self, run: str, state: str = "Completed", seconds: float = 240) -> float:
        took = wait_for(f"run {run} ends", lambda: self.state(run) in ENDS, seconds)
        assert self.state(run) == state, f"{self.whole_state(run)}\n{self.logs(run)}"
        return took

    def logs(self, run: str) -> str:
        query = {"logs": {"flow_run_id": {"any_": [run]}}, "limit": 200, "sort": "TIMESTAMP_ASC"}
        return "\n".join(line["message"] for line in self.insist("POST", "/logs/filter", query))

    def tasks(self, run: str) -> dict[str, str]:
        """{stage: state} of a flow run."""
        found = self.insist("POST", "/task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}, "limit": 200})
        return {task["name"]: task["state"]["name"] for task in found}
