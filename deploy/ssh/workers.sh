#!/bin/sh
# Workers of Prefect on machines that are reached by ssh, to which a run that spreads gives its stages (docs/operations.md,
# Stages on several machines).
#
#   deploy/ssh/workers.sh start  gpu1 gpu2 gpu3     # in each: a worker of the pool gpu, which outlives the connection
#   deploy/ssh/workers.sh status gpu1 gpu2 gpu3
#   deploy/ssh/workers.sh stop   gpu1 gpu2 gpu3     # ends what it runs, too: another worker takes that over after 90 s
#
# Each machine has a checkout in TESSERA_CHECKOUT (default: tessera, in the home of the user), made by make setup, with .env as
# .env.example has it: PREFECT_API_URL, the key of DVC's remote, and MLflow. TESSERA_LIMIT is how many stages it takes at a
# time (default 1): its GPUs.
set -eu
usage() {
    echo "usage: $0 start|stop|status HOST..." >&2
    exit 2
}
[ $# -ge 2 ] || usage
what=$1
shift
case $what in start | stop | status) ;; *) usage ;; esac
checkout=${TESSERA_CHECKOUT:-tessera} limit=${TESSERA_LIMIT:-1} failed=0
case $limit in '' | *[!0-9]*) echo "TESSERA_LIMIT is '$limit': expected a number, e.g. 1; correct it" >&2; exit 2 ;; esac

# Python starts the worker: of a background job of a shell it would inherit that SIGINT is ignored, and could not be ended
remote='
set -eu
cd "$checkout" || { echo "no checkout in $checkout: git clone, make setup" >&2; exit 2; }
mkdir -p .stack
file=.stack/ssh-worker.pid
runs() { [ -f "$file" ] && kill -0 "$(cat "$file")" 2> /dev/null; }
case $what in
start)
    if runs; then echo "runs already, process $(cat "$file")"; exit 0; fi
    [ -f .env ] || { echo "no .env in $checkout: see .env.example" >&2; exit 2; }
    set -a; . ./.env; set +a
    export PREFECT_HOME="${PREFECT_HOME:-$PWD/.prefect}" DO_NOT_TRACK=1 PREFECT_SERVER_ANALYTICS_ENABLED=false
    .venv/bin/python - "$limit" <<END > "$file"
import signal, subprocess, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
line = [".venv/bin/prefect", "worker", "start", "--pool", "gpu", "--type", "process", "--limit", sys.argv[1]]
with open(".stack/ssh-worker.log", "ab") as log:
    print(subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True).pid)
END
    echo "started, process $(cat "$file")" ;;
stop)
    if ! runs; then echo "does not run"; exit 0; fi
    kill -TERM "$(cat "$file")"
    for second in $(seq 120); do runs || { echo "stopped"; exit 0; }; sleep 1; done
    echo "process $(cat "$file") does not end" >&2; exit 2 ;;
status)
    if runs; then echo "runs, process $(cat "$file")"; else echo "does not run"; exit 1; fi ;;
esac
'
for host in "$@"; do
    printf '%s: ' "$host"
    ssh -o BatchMode=yes "$host" "what='$what' checkout='$checkout' limit='$limit'; $remote" || failed=1
done
exit $failed
