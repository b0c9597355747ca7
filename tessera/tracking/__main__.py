"""python -m tessera.tracking replay | upload | champion | view: see uploader.py, registry.py and view.py."""

import argparse
import os
import sys
import traceback
from pathlib import Path

from tessera.tracking import registry, view
from tessera.tracking.journal import redact
from tessera.tracking.mirror import note, tracking_uri
from tessera.tracking.processes import folder_of, start_uploader
from tessera.tracking.uploader import all_mirrors, connect, replay, shorten, upload


def champion(arguments: argparse.Namespace) -> int:
    """Send what MLflow lacks, then let the registry decide. Codes: 0 decided, 1 MLflow does not answer, 2 refused."""
    if replay(arguments.root, 120.0):
        return 1
    from tessera.params import InvalidParams, read

    try:
        dataset = arguments.dataset or read(arguments.root / "params.yaml").dataset.name
    except InvalidParams as error:
        print(f"{error}; name the data set by --dataset", file=sys.stderr)
        return 2
    name = f"tessera-{dataset}"
    try:
        client = connect(arguments.root)
        return registry.crown(client, name, arguments.metric, arguments.lower, arguments.threshold, arguments.dismiss)
    except Exception as error:  # MLflow raises its own, requests', SQLAlchemy's and the operating system's errors
        print(f"{redact(tracking_uri(arguments.root))} did not answer about {name}: {shorten(error)}", file=sys.stderr)
        return 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tessera.tracking", description="Mirror the journals into MLflow.")
    commands = parser.add_subparsers(dest="command", required=True)
    again = commands.add_parser("replay", help="send what MLflow lacks, e.g. after its server was down")
    again.add_argument("--root", type=Path, default=Path())
    again.add_argument("--timeout", type=float, default=120.0, help="seconds to wait for a running uploader")
    again.add_argument("--all", action="store_true", help="send everything again, e.g. after the database was lost")
    live = commands.add_parser("upload", help="mirror the journals live (stages start this by themselves)")
    live.add_argument("--root", type=Path, required=True)
    live.add_argument("--idle-seconds", type=float, default=20.0, help="exit this long after the last stage ended")
    best = commands.add_parser("champion", help="give the alias champion to the best version of a registered model")
    best.add_argument("--metric", required=True, help="a metric of systems, such as generation/fd_classifier")
    better = best.add_mutually_exclusive_group(required=True)
    better.add_argument("--lower", action="store_true", help="lower is better")
    better.add_argument("--higher", action="store_true", help="higher is better")
    best.add_argument("--threshold", type=float, required=True, help="a value that every champion has to beat")
    best.add_argument("--dataset", help="the model is called tessera-DATASET; default: that of params.yaml")
    best.add_argument("--dismiss", action="store_true", help="take the alias from a champion of another protocol")
    best.add_argument("--root", type=Path, default=Path())
    table = commands.add_parser("view", help="where MLflow's page shows the systems with their figures")
    table.add_argument("--server", default="http://127.0.0.1:5000")
    table.add_argument("--root", type=Path, default=Path())
    arguments = parser.parse_args()
    if arguments.command == "view":
        print(view.link(arguments.root, arguments.server) or "MLflow has no run of this checkout yet")
        return 0
    if arguments.command == "champion":
        return champion(arguments)
    if arguments.command == "replay":
        code = replay(arguments.root, arguments.timeout, arguments.all)
        if folder_of(arguments.root).is_dir() and any(mirror.alive() for mirror in all_mirrors(arguments.root, {})):
            start_uploader(arguments.root)  # for a stage that began meanwhile and found the lock taken
        return code
    os.nice(10)
    try:
        upload(arguments.root, arguments.idle_seconds)
    except Exception:
        note(folder_of(arguments.root), traceback.format_exc())
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
