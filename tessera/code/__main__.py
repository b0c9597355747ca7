"""Which code decides the result of each stage, and what to do when it changed.

    python -m tessera.code write --out data/code      # the stage fingerprint_code: a file for each entry of the graph
    python -m tessera.code changes                    # which definitions changed since each stage ran
    python -m tessera.code accept train_prior@vqgan-flow --why "a clearer loop, the same arithmetic"
    python -m tessera.code adopt                      # once, after an update from the code before fingerprints

A stage whose code changed is stale, and `dvc repro` runs it again. Where a person can tell that the change cannot matter,
`accept` keeps the result: it records the present outputs as those of the new code (`dvc commit`) and writes who decided
that, when and why into data/accepted.csv, which belongs into git.
"""

import argparse
import sys
from pathlib import Path

from tessera.code import keeping


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tessera.code", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    write = actions.add_parser("write", help="write the file of each entry")
    write.add_argument("--out", type=Path, required=True)
    actions.add_parser("changes", help="say which definitions changed since each stage ran")
    accept = actions.add_parser("accept", help="keep the results of stages whose code changed")
    accept.add_argument("stages", nargs="+", metavar="STAGE")
    accept.add_argument("--why", required=True, help="why the change of code cannot change the result")
    actions.add_parser("adopt", help="keep what was made by the code before fingerprints")
    given, root = parser.parse_args(arguments), Path.cwd()
    try:
        if given.action == "write":
            keeping.write(root, given.out)
        elif given.action == "changes":
            print("\n".join(keeping.told(root)) or "no stage's code changed since it ran")
        elif given.action == "accept":
            keeping.accept(root, given.stages, given.why)
        else:
            keeping.adopt(root)
    except (ValueError, OSError) as error:
        print(f"tessera.code {given.action} failed: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
